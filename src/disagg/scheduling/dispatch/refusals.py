"""Which sequences are not taken, and which are given up because no instance will ever do. Pure."""

from disagg.scheduling.dispatch.actions import FailReason, Refuse, RefuseReason
from disagg.scheduling.dispatch.choice import can_be_held, can_be_served
from disagg.scheduling.dispatch.fleet import Fleet
from disagg.scheduling.dispatch.state import SequenceEntry


def refusal(fleet: Fleet, sequence: SequenceEntry, num_sequences: int, limit: int) -> Refuse | None:
    """Return why a new sequence is not taken, where ``num_sequences`` of ``limit`` are under way; None when it is."""
    if num_sequences >= limit:
        reason = RefuseReason.OVERLOADED
        detail = f"{limit} sequences are under way, which is the limit (--max-queued-requests)"
    elif not can_be_served(fleet.entries, sequence):
        reason = RefuseReason.UNAVAILABLE
        detail = f"no instances are left that could serve a request ({fleet.describe()})"
    else:
        return None
    return Refuse(request_id=sequence.request_id, epoch=sequence.epoch, reason=reason, detail=detail)


def why_hopeless(fleet: Fleet, sequence: SequenceEntry) -> tuple[FailReason, str] | None:
    """Return why a sequence need not wait for an instance; None when one may still take it."""
    if not can_be_served(fleet.entries, sequence):
        return FailReason.UNAVAILABLE, f"no instances are left that could serve the request ({fleet.describe()})"
    if not can_be_held(fleet.entries, sequence):
        return FailReason.TOO_LONG, (
            f"the request needs up to {sequence.max_total_tokens} tokens with its answer, more than the instances "
            f"can hold ({fleet.describe()}); ask for fewer tokens or raise --kv-memory"
        )
    return None
