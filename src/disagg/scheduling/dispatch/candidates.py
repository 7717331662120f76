"""Whose paths are forecast: all instances of a small fleet, the least loaded of a large one. Pure.

A forecast looks at what an instance has to do, and there is one for each prefill and each decode instance together. So
of many, loads in tokens say which few are worth it (two random choices are nearly as good as all: Mitzenmacher, 2001).
"""

from collections.abc import Collection, Sequence
from functools import partial
from heapq import nlargest
from typing import Final

from disagg.base.ids import InstanceId
from disagg.base.request import Role
from disagg.scheduling.capacity import most_tokens
from disagg.scheduling.dispatch.fleet import Fleet
from disagg.scheduling.dispatch.prefixes import held_by
from disagg.scheduling.dispatch.state import InstanceEntry, SequenceEntry

FEW: Final = 12
"""Instances of which all are looked at."""
_OF_EACH: Final = 4
"""Of each role, those with the least load, and at most as many that hold the beginning of the sequence."""


def candidates(fleet: Fleet, sequence: SequenceEntry, but: Collection[InstanceId] = ()) -> Sequence[InstanceEntry]:
    """Return the instances whose paths are forecast for a sequence, none of ``but``, as they came."""
    if len(fleet.entries) <= FEW:
        return [entry for entry in fleet.entries if entry.instance not in but] if but else fleet.entries
    ready = fleet.ready
    held = nlargest(_OF_EACH, held_by(fleet, sequence, but), key=lambda entry: sequence.num_cached(entry.instance))
    found = {entry.order: entry for entry in held}
    for index in (ready.to_prefill, ready.to_decode, ready.to_do_both):
        needed = most_tokens(sequence.num_tokens, sequence.max_total_tokens, hand_over=index.role is Role.PREFILL)
        is_wanted = partial(_can_hold, needed, but)
        found |= {entry.order: entry for entry in index.least(_OF_EACH, is_wanted)}
    return [found[order] for order in sorted(found)]


def _can_hold(num_tokens: int, but: Collection[InstanceId], entry: InstanceEntry) -> bool:
    return entry.can_hold(num_tokens) and entry.instance not in but
