"""What the core of an instance remembers of a sequence beside the scheduler's counts: stamps, offer, its pull."""

from dataclasses import dataclass, field

from disagg.base.ids import Epoch, RequestId
from disagg.base.messages import KvOffer, Lend, Migrate, Pulled, Release, StageStamps
from disagg.scheduling.instance.header import InstanceHeader
from disagg.scheduling.instance.inputs import CopyEnded, CopySettled, SequenceFacts
from disagg.scheduling.instance.outputs import FirstOutput
from disagg.scheduling.step.actions import LendKv, OfferKv, OfferPart, ReleaseLease
from disagg.scheduling.step.events import (
    AnyEvent,
    BlockSaved,
    KvExtended,
    KvOffered,
    KvWanted,
    LeaseReleased,
    MigrationAsked,
    StepFailure,
    Tick,
    TransferEnded,
)


@dataclass(slots=True)
class Tracked:
    """One live sequence. ``expires_s`` is when its offer ends, by this instance's clock."""

    request_id: RequestId
    epoch: Epoch
    received_s: float
    offer: KvOffer | None = None
    parts: dict[int, KvOffer] = field(default_factory=dict)
    """While another instance computes it: what can be read already, by first block."""
    is_offer_prefix: bool = False
    """True when the offer is of blocks that are lent of its beginning."""
    expires_s: float = 0.0
    pull_started_s: float = 0.0
    copy: CopyEnded | None = None
    """How the last pull of its KV blocks ended, once one has."""
    num_bytes: int = 0
    """Of all its pulls, and how long they took: in all, and before the whole of it was offered."""
    copied_s: float = 0.0
    overlapped_s: float = 0.0
    num_repeated: int = 0
    digests_behind: bytes | None = None
    """Of the blocks that were read behind the step that wrote them, as they came; None where none were."""
    abandoned: str = ""
    """Why its offered KV blocks will not be pulled, if that is known."""
    scheduled_s: float = 0.0
    num_cached_tokens: int = 0
    failure: StepFailure | None = None
    """Why it could not be computed."""

    @property
    def is_expected(self) -> bool:
        """True while another instance computes it, for this one."""
        return bool(self.parts) and self.offer is None

    def comes_from(self, incarnation: str) -> bool:
        """True when its KV blocks, or some of them, are in the pool of that life of an instance."""
        offers = self.parts.values() if self.offer is None else (self.offer,)
        return any(offer.incarnation == incarnation for offer in offers)

    def take_whole(self, offer: KvOffer, now: float) -> None:
        """The instance that computed it offers all of it."""
        self.offer, self.received_s, self.pull_started_s = offer, now, 0.0

    def note_copy(self, result: CopyEnded) -> None:
        """Take account of a pull that ended."""
        self.copy = result
        self.num_bytes += result.num_bytes
        self.num_repeated += result.num_repeated
        if result.digests is not None and not result.failure:
            self.digests_behind = result.digests
        taken_s = result.ended_s - result.started_s
        self.copied_s += taken_s
        if self.is_expected:
            self.overlapped_s += taken_s
        elif self.parts:  # what was being read when the whole was offered
            self.overlapped_s += min(taken_s, max(0.0, self.received_s - result.started_s))

    def is_sound(self) -> bool:
        """Return whether what was read behind a step is what is offered; blocks that are not count as repeated."""
        offer, came = self.offer, self.digests_behind
        if offer is None or not offer.digests or came is None:
            return True
        size = len(offer.digests) // len(offer.block_ids)
        meant = offer.digests[len(offer.digests) - len(came) :]
        if came and came == meant:
            return True
        self.num_repeated += sum(
            came[start : start + size] != meant[start : start + size] for start in range(0, len(came), size)
        )
        return False

    def start_step(self, start: int, now: float) -> None:
        """Note its first step here; what lies before its first chunk was not computed."""
        self.scheduled_s = now
        self.num_cached_tokens = start if self.offer is None or self.is_offer_prefix else 0

    def first_output(self, now: float) -> FirstOutput:
        """Return what goes with its first token here, which is there ``now``."""
        stamps = StageStamps(
            received_s=self.received_s,
            # What was read before the whole was offered is no stage: nobody waited for it.
            pull_started_s=max(self.received_s, self.pull_started_s) if self.copy is not None else 0.0,
            pulled_s=max(self.received_s, self.copy.ended_s) if self.copy is not None else 0.0,
            scheduled_s=self.scheduled_s,
            first_step_done_s=now,
        )
        return FirstOutput(self.request_id, stamps, self.num_cached_tokens)


def pulled(action: ReleaseLease, sequence: Tracked | None, now: float) -> Pulled:
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
        num_bytes=sequence.num_bytes if sequence is not None and succeeded else 0,
        duration_s=sequence.copied_s if sequence is not None else 0.0,
        failure=failure,
        link=copy.link if copy is not None else "",
        num_repeated=sequence.num_repeated if sequence is not None else 0,
        overlapped_s=sequence.overlapped_s if sequence is not None else 0.0,
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
    # Behind the step that writes the last of them, the token that follows them is not known yet.
    most_tokens = facts.num_tokens if offer.behind_step else facts.num_tokens - 1
    if same and 0 < offer.num_tokens <= most_tokens:
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


def kv_offer(
    action: OfferKv | OfferPart | LendKv, header: InstanceHeader, first_block: int = 0, behind_step: int = 0
) -> KvOffer:
    """Return what says where the blocks are that the scheduler offers."""
    return KvOffer(
        request_id=action.request_id,
        epoch=action.epoch,
        source=header.instance,
        incarnation=header.incarnation,
        num_tokens=action.num_tokens,
        block_size=header.block_size,
        block_ids=action.block_ids,
        lease_s=action.lease_s,
        pool=header.pool,
        first_block=first_block,
        behind_step=behind_step,
    )


def kv_offered(
    facts: SequenceFacts,
    offer: KvOffer,
    expires_s: float,
    *,
    is_whole: bool,
    is_sound: bool = True,
    answer_age_s: float = 0.0,
) -> KvOffered:
    """Return what an offer, which ends at ``expires_s``, means to the scheduler."""
    return KvOffered(
        request_id=facts.request_id,
        epoch=facts.epoch,
        num_tokens=facts.num_tokens,
        max_total_tokens=facts.max_total_tokens,
        source=offer.source,
        source_blocks=offer.block_ids,
        num_kv_tokens=offer.num_tokens,
        expires_s=expires_s,
        priority=facts.priority,
        arrival_s=facts.arrival_s,
        block_hashes=facts.block_hashes,
        objectives=facts.objectives,
        is_whole=is_whole,
        behind_step=offer.behind_step,
        is_sound=is_sound,
        answer_age_s=answer_age_s,
        num_later_tokens=offer.num_later_tokens,
    )


def kv_extended(offer: KvOffer, expires_s: float) -> KvExtended:
    """Return what a further part, whose offer ends at ``expires_s``, means to the scheduler."""
    return KvExtended(
        request_id=offer.request_id,
        epoch=offer.epoch,
        first_block=offer.first_block,
        source_blocks=offer.block_ids,
        num_kv_tokens=offer.num_tokens,
        expires_s=expires_s,
        behind_step=offer.behind_step,
    )


def event_of(message: Lend | Release | Migrate | CopySettled | BlockSaved | Tick) -> AnyEvent:
    """Return what a message means to the scheduler that means nothing more to the core."""
    match message:
        case Lend(request_id=request_id, epoch=epoch, block_hashes=names):
            return KvWanted(request_id=request_id, epoch=epoch, block_hashes=names)
        case Release(request_id=request_id, epoch=epoch):
            return LeaseReleased(request_id=request_id, epoch=epoch)
        case Migrate(request_id=request_id, epoch=epoch):
            return MigrationAsked(request_id=request_id, epoch=epoch)
        case CopySettled(request_id=request_id, epoch=epoch):
            return TransferEnded(request_id=request_id, epoch=epoch)
        case BlockSaved() | Tick():
            return message
