"""What of an instance's work is not one router's: the one place that says so. Pure."""

from collections.abc import Iterable

from disagg.base.ids import RouterId, owner_of
from disagg.base.router_messages import ForeignLoad
from disagg.cache.leases import Lease
from disagg.scheduling.step.sequence import Sequence, SequenceState

_TO_COMPUTE = frozenset({SequenceState.WAITING, SequenceState.RUNNING})


def leases_of(leases: Iterable[Lease], router: RouterId) -> list[Lease]:
    """Return those that are for this router's sequences."""
    return [lease for lease in leases if owner_of(lease.request_id) == router]


def foreign_load(sequences: Iterable[Sequence], loans: Iterable[Lease], router: RouterId) -> ForeignLoad:
    """Return the load of all sequences but those of ``router``, as its dispatch counts its own.

    A sequence waits to be prefilled while more than its last token is to be computed; later it is judged by the tokens
    whose KV is here, or on its way here. Who reads a loan is no load, and keeps the instance from being empty.
    """
    num_sequences = sum(owner_of(loan.request_id) != router for loan in loans)
    num_prefills = prefill_tokens = prefill_squares = num_decodes = kv_tokens = 0
    for sequence in sequences:
        if owner_of(sequence.request_id) == router:
            continue
        num_sequences += 1
        to_compute = sequence.num_tokens - sequence.num_computed
        if to_compute > 1 and sequence.state in _TO_COMPUTE:
            num_prefills += 1
            prefill_tokens += to_compute
            prefill_squares += to_compute**2
        else:
            num_decodes += sequence.state is not SequenceState.LEASED
            kv_tokens += sequence.num_tokens
    return ForeignLoad(
        num_sequences=num_sequences,
        num_prefills=num_prefills,
        prefill_tokens=prefill_tokens,
        prefill_squares=prefill_squares,
        num_decodes=num_decodes,
        kv_tokens=kv_tokens,
    )
