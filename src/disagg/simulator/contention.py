"""Instances of one host slow one another down: they share its memory bandwidth and its last-level cache.

What a neighbour computes is one of three things: nothing, a step with prefill in it, or a step of decodes alone. Each
computing neighbour adds to a step what it did add in measurements, by what it computes when the step begins.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from disagg.base.ids import InstanceId
from disagg.simulator.latency import LatencyModel, StepShape


class Activity(enum.Enum):
    """What an instance computes."""

    PREFILL = "prefill"
    """A step with a prompt's chunk in it, decodes beside it or not."""
    DECODE = "decode"

    @classmethod
    def of(cls, shape: StepShape) -> "Activity":
        """Return what a step of this shape is."""
        return cls.PREFILL if shape.num_prefills else cls.DECODE


class Interference(Protocol):
    """Predicts what a neighbour costs."""

    def added_s(self, neighbour: Activity, shape: StepShape) -> float:
        """Return the seconds that a neighbour's activity adds to a step of this shape."""


@dataclass(frozen=True)
class LatencyBeside:
    """A latency model of an instance beside neighbours that compute. See ``LatencyModel``."""

    alone: LatencyModel
    interference: Interference
    neighbours: tuple[Activity, ...]

    @property
    def num_stages(self) -> int:
        """See ``LatencyModel``."""
        return self.alone.num_stages

    def stage_times_s(self, shape: StepShape) -> tuple[float, ...]:
        """See ``LatencyModel``."""
        added_s = sum(self.interference.added_s(neighbour, shape) for neighbour in self.neighbours)
        return tuple(time_s + added_s / self.num_stages for time_s in self.alone.stage_times_s(shape))


class Host:
    """The instances of one host, and what each of them computes now. Without ``interference`` none minds another."""

    def __init__(self, interference: Interference | None = None) -> None:
        self._interference = interference
        self._on_change: dict[InstanceId, Callable[[], None]] = {}
        self._activities: dict[InstanceId, Activity] = {}

    def join(self, instance: InstanceId, on_change: Callable[[], None]) -> None:
        """Add an instance; ``on_change`` is called when a neighbour takes up, changes or ends what it computes."""
        self._on_change[instance] = on_change

    def set_activity(self, instance: InstanceId, activity: Activity | None) -> None:
        """Note what an instance computes from now on, and tell its neighbours if that is news."""
        if self._interference is None or self._activities.get(instance) is activity:
            return
        if activity is None:
            del self._activities[instance]
        else:
            self._activities[instance] = activity
        for neighbour, on_change in self._on_change.items():
            if neighbour != instance:
                on_change()

    def beside_neighbours(self, instance: InstanceId, alone: LatencyModel) -> LatencyModel:
        """Return the latency model of an instance for steps that begin now."""
        neighbours = tuple(activity for name, activity in self._activities.items() if name != instance)
        if self._interference is None or not neighbours:
            return alone
        return LatencyBeside(alone, self._interference, neighbours)
