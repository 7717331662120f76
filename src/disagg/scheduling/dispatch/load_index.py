"""The ready instances of a role in order of load, so that a choice looks at the first of them and not at all. Pure.

A heap of lower bounds: loads mostly grow, token by token, which is noticed when the instance comes to the top; only a
load that falls has to be told. What comes out is what a scan of all instances would find.
"""

import heapq
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from disagg.base.errors import InternalError
from disagg.base.request import Role
from disagg.scheduling.dispatch.state import InstanceEntry, InstanceState

_SPARE_ITEMS: Final = 64
"""Items of the heap beside two for each instance, before those that are out of date are thrown out."""


Load = tuple[int, int]
"""Tokens, and others that decide between equals."""
LoadOf = Callable[[InstanceEntry], Load]


def prefill_load(entry: InstanceEntry) -> Load:
    """Return by what prefill instances are compared: what waits for its first token there."""
    return entry.prefill_tokens, entry.kv_tokens


def decode_load(entry: InstanceEntry) -> Load:
    """Return by what those are compared that go on with sequences: the KV that they hold."""
    return entry.kv_tokens, entry.prefill_tokens


def both_loads(entry: InstanceEntry) -> Load:
    """Return by what instances are compared that do everything."""
    return entry.prefill_tokens + entry.kv_tokens, entry.kv_tokens


class LoadIndex:
    """Instances by one load, least first; of equals the one that joined first."""

    def __init__(self, role: Role, entries: Iterable[InstanceEntry], load_of: LoadOf) -> None:
        self.role = role
        self._load_of = load_of
        self._items = {entry.instance: (*load_of(entry), entry.order, entry) for entry in entries}
        """What was noted of each last: never more than its load."""
        self._heap = list(self._items.values())
        heapq.heapify(self._heap)

    def __len__(self) -> int:
        return len(self._items)

    @property
    def num_items(self) -> int:
        """Items of the heap, those that are out of date included: bounded by the number of instances."""
        return len(self._heap)

    def __contains__(self, entry: InstanceEntry) -> bool:
        return entry.instance in self._items

    def fell(self, entry: InstanceEntry) -> None:
        """Note that a load may be lower than before."""
        known = self._items.get(entry.instance)
        if known is None:
            return
        load = self._load_of(entry)
        if load < known[:2]:
            item = (*load, entry.order, entry)
            self._items[entry.instance] = item
            heapq.heappush(self._heap, item)
            if len(self._heap) > 2 * len(self._items) + _SPARE_ITEMS:
                self._heap = list(self._items.values())
                heapq.heapify(self._heap)

    def first(self, is_wanted: Callable[[InstanceEntry], bool]) -> InstanceEntry | None:
        """Return the one with the least load of those that are wanted; None where none is."""
        item = self._top()
        if item is None or is_wanted(item[3]):
            return None if item is None else item[3]
        found = self.least(1, is_wanted)
        return found[0] if found else None

    def least(self, number: int, is_wanted: Callable[[InstanceEntry], bool]) -> list[InstanceEntry]:
        """Return so many with the least load of those that are wanted, least first; all where there are fewer."""
        passed: list[tuple[int, int, int, InstanceEntry]] = []
        found: list[InstanceEntry] = []
        while (item := self._top()) is not None:
            if is_wanted(item[3]):
                found.append(item[3])
                if len(found) == number:
                    break
            passed.append(heapq.heappop(self._heap))
        for item in passed:
            heapq.heappush(self._heap, item)
        return found

    def _top(self) -> tuple[int, int, int, InstanceEntry] | None:
        """Return what is first now, with its present load."""
        heap, items = self._heap, self._items
        while heap:
            item = heap[0]
            entry = item[3]
            if items[entry.instance] is not item:
                heapq.heappop(heap)  # a lower one is in the heap, too
                continue
            load = self._load_of(entry)
            if load == item[:2]:
                return item
            items[entry.instance] = grown = (*load, item[2], entry)
            heapq.heapreplace(heap, grown)
        return None

    def validate(self) -> None:
        """Raise InternalError where a load is lower than what was noted of it."""
        for entry in (item[3] for item in self._items.values()):
            if self._load_of(entry) < self._items[entry.instance][:2]:
                raise InternalError(f"the load of {entry.describe()} fell to {self._load_of(entry)} unnoticed")


class ReadyInstances:
    """The instances that take new sequences, by role, as of the last change of a state or a role."""

    def __init__(self, entries: Sequence[InstanceEntry]) -> None:
        ready: dict[Role, list[InstanceEntry]] = {role: [] for role in Role}
        self.roles_to_come = frozenset(entry.role for entry in entries if entry.will_take)
        """The roles of the instances that take new sequences, now or once they are up."""
        for entry in entries:
            if entry.state is InstanceState.READY:
                ready[entry.role].append(entry)
        self.to_prefill = LoadIndex(Role.PREFILL, ready[Role.PREFILL], prefill_load)
        self.to_decode = LoadIndex(Role.DECODE, ready[Role.DECODE], decode_load)
        self.to_do_both = LoadIndex(Role.COLOCATED, ready[Role.COLOCATED], both_loads)
        self.to_go_on = LoadIndex(Role.COLOCATED, ready[Role.COLOCATED], decode_load)
        """The same as ``to_do_both``, for sequences that were prefilled elsewhere."""
        self._of_role = {
            Role.PREFILL: (self.to_prefill,),
            Role.DECODE: (self.to_decode,),
            Role.COLOCATED: (self.to_do_both, self.to_go_on),
        }

    def fell(self, entry: InstanceEntry) -> None:
        """Note that a load may be lower than before."""
        for index in self._of_role[entry.role]:
            index.fell(entry)

    def validate(self) -> None:
        """Raise InternalError where a load is lower than what was noted of it."""
        for index in (self.to_prefill, self.to_decode, self.to_do_both, self.to_go_on):
            index.validate()
