"""What held prefixes are worth: tokens that a start need not compute, and who lends them to whom. Pure.

Costs are counted in tokens that a prefill instance computes, so that what is queued and what is held weigh against each
other: an instance that holds a prefix is taken only while the tokens it saves are more than its longer queue. KV that
another instance holds is pulled where that beats computing it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Final

from disagg.base.config import CacheRouting
from disagg.base.ids import BlockHash, InstanceId
from disagg.cache.prefix_index import HeldPrefix, PrefixIndex
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
    index: PrefixIndex, names: Sequence[BlockHash], routing: CacheRouting
) -> Mapping[InstanceId, HeldPrefix]:
    """Return who holds how much of a sequence's beginning, as far as dispatch is to know."""
    if not names or routing is CacheRouting.BLIND:
        return _NONE_HELD
    held = index.find(names)
    if routing is CacheRouting.AFFINITY:
        return {instance: replace(prefix, num_in_pool=0) for instance, prefix in held.items()}
    return held


def choose_lender(
    instances: Iterable[InstanceEntry], sequence: SequenceEntry, borrower: InstanceEntry
) -> InstanceEntry | None:
    """Return the instance from which ``borrower`` pulls the beginning of a sequence that it is to compute, if any.

    The one that holds most of it in its pool; of equals the one with the fewest sequences.
    """
    if not sequence.held:
        return None
    lender = max(
        (entry for entry in instances if entry is not borrower and entry.is_alive),
        key=lambda entry: (_num_lent(entry, sequence), -entry.num_sequences),
        default=None,
    )
    if lender is None or _gain(lender, sequence, borrower) < MIN_LOAN:
        return None
    return lender


def num_to_compute(sequence: SequenceEntry, entry: InstanceEntry, lender: InstanceEntry | None = None) -> int:
    """Return how many of a sequence's tokens an instance lacks, given who lends it their beginning."""
    num_here = sequence.num_cached(entry.instance)
    return sequence.num_tokens - (num_here if lender is None else max(num_here, _num_lent(lender, sequence)))


def start_cost(instances: Iterable[InstanceEntry], sequence: SequenceEntry, entry: InstanceEntry) -> float:
    """Return the tokens that an instance computes until a new sequence's first token: those that wait, and its own."""
    cost = entry.prefill_tokens + num_to_compute(sequence, entry)
    lender = choose_lender(instances, sequence, entry)
    return cost if lender is None else cost - _gain(lender, sequence, entry) * (1 - PULL_COST)


def choose_append(sequence: SequenceEntry, decode: Iterable[InstanceEntry]) -> tuple[InstanceEntry, float] | None:
    """Return which decode instance had best go on alone with a sequence whose beginning it holds, and its cost.

    None where none holds most of it: a prompt that merely begins like others is a prefill instance's work.
    """
    costs = [(_append_cost(entry, sequence), entry) for entry in decode if holds_most(entry, sequence)]
    if not costs:
        return None
    cost, entry = min(costs, key=lambda pair: pair[0])
    return entry, cost


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
