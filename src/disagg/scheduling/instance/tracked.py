"""What the core of an instance remembers of a sequence beside the scheduler's counts: stamps, offer, its pull."""

from dataclasses import dataclass

from disagg.base.ids import Epoch, RequestId
from disagg.base.messages import KvOffer, Pulled, StageStamps
from disagg.scheduling.instance.inputs import CopyEnded, SequenceFacts
from disagg.scheduling.instance.outputs import FirstOutput
from disagg.scheduling.step.actions import ReleaseLease
from disagg.scheduling.step.events import StepFailure


@dataclass(slots=True)
class Tracked:
    """One live sequence. ``expires_s`` is when its offer ends, by this instance's clock."""

    request_id: RequestId
    epoch: Epoch
    received_s: float
    offer: KvOffer | None = None
    is_offer_prefix: bool = False
    """True when the offer is of blocks that are lent of its beginning."""
    expires_s: float = 0.0
    pull_started_s: float = 0.0
    copy: CopyEnded | None = None
    """How the pull of its KV blocks ended, once it has."""
    abandoned: str = ""
    """Why its offered KV blocks will not be pulled, if that is known."""
    scheduled_s: float = 0.0
    num_cached_tokens: int = 0
    failure: StepFailure | None = None
    """Why it could not be computed."""

    def start_step(self, start: int, now: float) -> None:
        """Note its first step here; what lies before its first chunk was not computed."""
        self.scheduled_s = now
        self.num_cached_tokens = start if self.offer is None or self.is_offer_prefix else 0

    def first_output(self, now: float) -> FirstOutput:
        """Return what goes with its first token here, which is there ``now``."""
        stamps = StageStamps(
            received_s=self.received_s,
            pull_started_s=self.pull_started_s,
            pulled_s=self.copy.ended_s if self.copy is not None else 0.0,
            scheduled_s=self.scheduled_s,
            first_step_done_s=now,
        )
        return FirstOutput(self.request_id, stamps, self.num_cached_tokens)


def pulled_message(action: ReleaseLease, sequence: Tracked | None, now: float) -> Pulled:
    """Return what lets the source of an offer free its blocks: how the pull went, or why there will be none.

    ``sequence`` is None when a newer attempt has taken the place of the one that was offered.
    """
    copy = sequence.copy if sequence is not None else None
    failure = _why_unread(sequence, now)
    succeeded = copy is not None and not failure
    return Pulled(
        request_id=action.request_id,
        epoch=action.epoch,
        source=action.source,
        num_bytes=copy.num_bytes if copy is not None and succeeded else 0,
        duration_s=copy.ended_s - copy.started_s if copy is not None else 0.0,
        failure=failure,
        link=copy.link if copy is not None else "",
        num_repeated=copy.num_repeated if copy is not None else 0,
    )


def _why_unread(sequence: Tracked | None, now: float) -> str:
    """Return why the offered blocks were not (all) read; empty when they were, or when none was missing here."""
    if sequence is None or sequence.offer is None:
        return "a newer attempt has taken the sequence's place"
    if sequence.copy is not None and sequence.copy.failure:
        return sequence.copy.failure
    if now >= sequence.expires_s:
        return "the lease expired before the blocks were read"
    return sequence.abandoned if sequence.copy is None else ""


def mismatch(offer: KvOffer, facts: SequenceFacts) -> str:
    """Return why an offer cannot be this sequence's; an empty string where it can."""
    same = (offer.request_id, offer.epoch) == (facts.request_id, facts.epoch)
    if same and 0 < offer.num_tokens < facts.num_tokens:
        return ""
    return (
        f"the offer of {offer.num_tokens} tokens of {offer.request_id} (epoch {offer.epoch}) does not belong "
        f"to a sequence of {facts.num_tokens} tokens (epoch {facts.epoch})"
    )


def unread(offer: KvOffer, why: str) -> Pulled:
    """Return what lets the source of an offer that was refused free its blocks."""
    return Pulled(
        request_id=offer.request_id,
        epoch=offer.epoch,
        source=offer.source,
        num_bytes=0,
        duration_s=0.0,
        failure=why,
    )
