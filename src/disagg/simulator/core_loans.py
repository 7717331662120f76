"""Which instance of a host has lent which cores, and who computes on them: the board of lent cores in virtual time."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from disagg.base.ids import InstanceId


@dataclass(slots=True)
class _Instance:
    own: tuple[int, ...]
    others: tuple[int, ...]
    is_lending: bool = True
    has_step: bool = False
    wanted: tuple[int, ...] = ()
    """The cores of others on which its step may be computed."""
    held: set[int] = field(default_factory=set)
    """Those of them on which it is."""


class CoreLoans:
    """The rules of the live board (engine/kernels/native/core_board.h). Pure.

    A core is borrowed while its owner lends it, by one step at a time, and given back at once when its owner wants it;
    when that has done, a running step takes it again. Of several steps that may, that of the instance which joined
    first does; live, whoever wakes up first.
    Methods name the instances whose steps compute on more or fewer cores from now on.
    """

    def __init__(self) -> None:
        self._instances: dict[InstanceId, _Instance] = {}
        self._owners: dict[int, _Instance] = {}
        self._holders: dict[int, InstanceId] = {}

    def join(self, instance: InstanceId, own: Sequence[int], others: Sequence[int]) -> None:
        """Add an instance, which lends its ``own`` cores, and may borrow ``others``, the nearest first."""
        self._instances[instance] = entry = _Instance(tuple(own), tuple(others))
        self._owners |= dict.fromkeys(own, entry)

    def begin(self, instance: InstanceId, most: int) -> list[InstanceId]:
        """Begin a step, which may use so many cores of others: it takes those that it can get, and has its own back."""
        entry = self._instances[instance]
        changed = self._take_back(entry) if entry.is_lending else []
        entry.has_step, entry.wanted = True, entry.others[:most]
        self._take(instance, entry)
        return changed

    def end(self, instance: InstanceId) -> list[InstanceId]:
        """End a step, if there is one: it gives back what it borrowed. Its own cores stay so until it lends them."""
        entry = self._instances[instance]
        entry.has_step = False
        if not entry.held:
            return []
        for core in entry.held:
            del self._holders[core]
        entry.held.clear()
        return self._hand_out()

    def lend(self, instance: InstanceId) -> list[InstanceId]:
        """Lend the cores of an instance without a step."""
        entry = self._instances[instance]
        if entry.is_lending:
            return []
        entry.is_lending = True
        return self._hand_out()

    def num_borrowed(self, instance: InstanceId) -> int:
        """Return on how many cores of others an instance's step is computed."""
        return len(self._instances[instance].held)

    def rivals(self, instance: InstanceId) -> list[InstanceId]:
        """Return who computes on a core that this instance's step would take if it ended now."""
        wanted = self._instances[instance].wanted
        return [holder for core in wanted if (holder := self._holders.get(core, instance)) != instance]

    def is_waited_for(self, instance: InstanceId) -> bool:
        """Return whether another's step would take a core that this instance's computes on, if this one ended now."""
        held = self._instances[instance].held
        return bool(held) and any(
            entry.has_step and not held.isdisjoint(entry.wanted)
            for name, entry in self._instances.items()
            if name != instance
        )

    def _take_back(self, entry: _Instance) -> list[InstanceId]:
        entry.is_lending = False
        changed = []
        for core in entry.own:
            holder = self._holders.pop(core, None)
            if holder is not None:
                self._instances[holder].held.remove(core)
                if holder not in changed:
                    changed.append(holder)
        return changed

    def _hand_out(self) -> list[InstanceId]:
        return [name for name, entry in self._instances.items() if entry.has_step and self._take(name, entry)]

    def _take(self, instance: InstanceId, entry: _Instance) -> bool:
        free = [core for core in entry.wanted if core not in self._holders and self._owners[core].is_lending]
        entry.held.update(free)
        self._holders |= dict.fromkeys(free, instance)
        return bool(free)
