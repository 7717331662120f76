"""What held prefixes are worth: tokens that a start need not compute, and who lends them to whom. Pure.

Costs are counted in tokens that a prefill instance computes, so that what is queued and what is held weigh against each
other: an instance that holds a prefix is taken only while the tokens it saves are more than its longer queue. KV that
another instance holds is pulled where that beats computing it.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from heapq import nsmallest
from types import MappingProxyType
from typing import Final

from disagg.base.cache_routing import CacheRouting
from disagg.base.ids import InstanceId
from disagg.cache.prefix_index import HeldPrefix, PrefixIndex
from disagg.scheduling.dispatch.fleet import Fleet
from disagg.scheduling.dispatch.state import InstanceEntry, SequenceEntry

PULL_COST: Final = 1 / 16
"""Tokens computed in the time that one token's KV travels: a cautious guess. A 70B model on 8 H100 prefills a token in
about 100 us, whose 320 KB take 6 us at 50 GB/s."""
_NONE_HELD: Final[Mapping[InstanceId, HeldPrefix]] = MappingProxyType({})
MIN_LOAN: Final = 128
"""Fewer tokens are not worth the messages."""
BUSY_COST: Final = 2.0
"""What a prompt's token costs on a decode instance that has answers to write: it slows them as well."""


def held_prefixes(
    index: PrefixIndex, sequence: SequenceEntry, routing: CacheRouting
) -> Mapping[InstanceId, HeldPrefix]:
    """Return who holds how much of a sequence's beginning, as far as dispatch is to know."""
    if not sequence.block_hashes or routing is CacheRouting.BLIND:
        return _NONE_HELD
    held = index.find(sequence.block_hashes, sequence.hash_block_size)
    if routing is CacheRouting.AFFINITY:
        return {instance: replace(prefix, num_in_pool=0) for instance, prefix in held.items()}
    return held


def lenders(fleet: Fleet, sequence: SequenceEntry, but: Collection[InstanceId] = ()) -> tuple[InstanceEntry, ...]:
    """Return the two instances that hold most of a sequence's beginning in their pools, where others can read it.

    Of equals those with the fewest sequences. Two, as the first may be the one that is to compute the rest.
    """
    if not sequence.held:
        return ()
    holders = [
        entry for entry in held_by(fleet, sequence, but) if entry.is_alive and _num_lent(entry, sequence) >= MIN_LOAN
    ]
    return tuple(nsmallest(2, holders, lambda one: (-_num_lent(one, sequence), one.num_sequences, one.order)))


def held_by(fleet: Fleet, sequence: SequenceEntry, but: Collection[InstanceId] = ()) -> list[InstanceEntry]:
    """Return the instances that hold a beginning of a sequence, those named left out."""
    known = (fleet.find(instance) for instance in sequence.held if instance not in but)
    return [entry for entry in known if entry is not None]


def choose_lender(
    holders: Iterable[InstanceEntry], sequence: SequenceEntry, borrower: InstanceEntry
) -> InstanceEntry | None:
    """Return which of ``lenders`` lends the beginning of a sequence to an instance that is to compute it, if any."""
    lender = next((entry for entry in holders if entry is not borrower), None)
    if lender is None or _gain(lender, sequence, borrower) < MIN_LOAN:
        return None
    return lender


def num_to_compute(sequence: SequenceEntry, entry: InstanceEntry, lender: InstanceEntry | None = None) -> int:
    """Return how many of a sequence's tokens an instance lacks, given who lends it their beginning."""
    if not sequence.held:
        return sequence.num_tokens
    num_here = sequence.num_cached(entry.instance)
    return sequence.num_tokens - (num_here if lender is None else max(num_here, _num_lent(lender, sequence)))


def start_cost(holders: Iterable[InstanceEntry], sequence: SequenceEntry, entry: InstanceEntry) -> float:
    """Return the tokens that an instance computes until a new sequence's first token: those that wait, and its own.

    ``holders`` are the ``lenders`` of its beginning.
    """
    cost = entry.prefill_tokens + num_to_compute(sequence, entry)
    lender = choose_lender(holders, sequence, entry)
    return cost if lender is None else cost - _gain(lender, sequence, entry) * (1 - PULL_COST)


def choose_append(sequence: SequenceEntry, decode: Iterable[InstanceEntry]) -> tuple[InstanceEntry, float] | None:
    """Return which decode instance had best go on alone with a sequence whose beginning it holds, and its cost.

    None where none holds most of it: a prompt that merely begins like others is a prefill instance's work.
    """
    best = min(
        (entry for entry in decode if holds_most(entry, sequence)),
        key=lambda entry: (_append_cost(entry, sequence), entry.order),
        default=None,
    )
    return None if best is None else (best, _append_cost(best, sequence))


def hand_over_cost(sequence: SequenceEntry, decode: InstanceEntry) -> float:
    """Return what it costs to bring a prompt to a decode instance: what that holds already does not travel."""
    return num_to_compute(sequence, decode) * PULL_COST


def holds_most(entry: InstanceEntry, sequence: SequenceEntry) -> bool:
    """Return whether an instance holds at least half of a sequence: a conversation that it has had."""
    num_cached = sequence.num_cached(entry.instance)
    return num_cached >= max(MIN_LOAN, sequence.num_tokens - num_cached)


def _append_cost(entry: InstanceEntry, sequence: SequenceEntry) -> float:
    cost = entry.prefill_tokens + num_to_compute(sequence, entry)
    return cost * BUSY_COST if entry.num_sequences else float(cost)


def _num_lent(entry: InstanceEntry, sequence: SequenceEntry) -> int:
    held = sequence.held.get(entry.instance)
    return 0 if held is None else min(held.num_in_pool, sequence.num_tokens - 1)


def _gain(lender: InstanceEntry, sequence: SequenceEntry, borrower: InstanceEntry) -> int:
    return _num_lent(lender, sequence) - sequence.num_cached(borrower.instance)
