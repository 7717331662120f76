"""A sequence whose beginning another instance lends to the one that computes it: its moves, and what is said. Pure.

The lender is asked first, and keeps the blocks under a lease; then the chosen instance is told where they are. It pulls
them and computes the rest. Whatever goes wrong on the way, it computes all of it.
"""

from disagg.base.ids import BlockHash, InstanceId
from disagg.scheduling.dispatch.actions import SendGenerate, SendLend
from disagg.scheduling.dispatch.events import NothingLent, OfferMade
from disagg.scheduling.dispatch.state import SequenceEntry, Whereabouts


def start(sequence: SequenceEntry, state: Whereabouts, now: float, *, with_prefix: bool = False) -> SendGenerate:
    """Let the holder compute the sequence; it is in ``state`` then, once it has pulled the prefix that was lent."""
    assert sequence.holder is not None, "an instance was chosen"
    how = "pulls its beginning and starts" if with_prefix else "starts"
    sequence.move(Whereabouts.PULLING if with_prefix else state, now, f"{how} on {sequence.holder}")
    return SendGenerate(
        request_id=sequence.request_id,
        epoch=sequence.epoch,
        instance=sequence.holder,
        hand_over=state is Whereabouts.PREFILLING,
        with_prefix=with_prefix,
    )


def borrow(sequence: SequenceEntry, lender: InstanceId, state: Whereabouts, now: float) -> SendLend:
    """Ask for the blocks of the sequence's beginning, before the holder is told anything."""
    sequence.move(Whereabouts.BORROWING, now, f"borrows from {lender}")
    sequence.lease, sequence.borrows_for = lender, state
    return SendLend(request_id=sequence.request_id, epoch=sequence.epoch, instance=lender)


def lendable(names: tuple[BlockHash, ...], num_tokens: int, block_size: int) -> tuple[BlockHash, ...]:
    """Return which of a prompt's blocks its borrower has a use for: it computes the last of ``num_tokens`` itself."""
    return names[: (num_tokens - 1) // block_size]


def answered(sequence: SequenceEntry, now: float, *, has_lent: bool) -> SendGenerate:
    """The lender has answered, or never will: tell the holder."""
    state = sequence.borrows_for
    assert state is not None, "it borrows"
    if not has_lent:
        sequence.borrows_for = None
    return start(sequence, state, now, with_prefix=has_lent)


def waits_for(sequence: SequenceEntry | None, answer: OfferMade | NothingLent) -> bool:
    """Return whether this is what a lender says of the blocks that the sequence borrows."""
    return (
        sequence is not None
        and sequence.state is Whereabouts.BORROWING
        and (sequence.epoch, sequence.lease) == (answer.epoch, answer.instance)
    )
