"""Instances of one host slow one another down: they share its memory bandwidth, its last-level cache, and its cores.

What a neighbour computes is one of three things: nothing, a step with prefill in it, or a step of decodes alone. Each
computing neighbour adds to a step what it did add in measurements, by what it computes when the step begins.

The cores are shared with what serves: API, router, the kernel's sockets and the clients of this machine. Each step that
brings out tokens makes them some work. A core on which no instance computes does it unnoticed; where there is none, the
computing instances lose that time in equal parts.
"""

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from disagg.base.ids import InstanceId
from disagg.simulator.latency import LatencyModel, StepShape

_MOST_SERVED: Final = 0.9
"""Of a core's time: beyond it, figures from a calm machine say nothing."""


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
class ServingCost:
    """CPU time of serving, made by each step that brings out tokens: ``step_s``, and ``token_s`` for each of them.

    ``num_cores`` are those that the server may use, ``cores_per_instance`` those on which an instance computes.
    """

    step_s: float
    token_s: float
    num_cores: int
    cores_per_instance: int = 1

    def is_felt(self, num_computing: int) -> bool:
        """Return whether so many computing instances leave no core for what serves."""
        return self.num_cores < num_computing * self.cores_per_instance + 1

    def work_s(self, num_tokens: int) -> float:
        """Return what a step that brings out so many tokens costs."""
        return self.step_s + self.token_s * num_tokens if num_tokens else 0.0


@dataclass(frozen=True)
class LatencyBeside:
    """A latency model of an instance beside neighbours that compute. See ``LatencyModel``.

    With ``serving``, this instance and its neighbours share the work of serving: its own steps', and that of theirs,
    which takes the part ``served_neighbours`` of one core's time.
    """

    alone: LatencyModel
    interference: Interference | None
    neighbours: tuple[Activity, ...]
    serving: ServingCost | None = None
    served_neighbours: float = 0.0

    @property
    def num_stages(self) -> int:
        """See ``LatencyModel``."""
        return self.alone.num_stages

    def stage_times_s(self, shape: StepShape) -> tuple[float, ...]:
        """See ``LatencyModel``."""
        added_s, own_part = 0.0, 1.0
        if self.interference is not None:
            added_s = sum(self.interference.added_s(neighbour, shape) for neighbour in self.neighbours)
        if self.serving is not None:
            num_sharing = len(self.neighbours) + 1
            added_s += self.serving.work_s(shape.num_samples) / num_sharing
            own_part = 1 - min(self.served_neighbours, _MOST_SERVED) / num_sharing
        return tuple((time_s + added_s / self.num_stages) / own_part for time_s in self.alone.stage_times_s(shape))


@dataclass(frozen=True)
class _Computing:
    """What an instance computes, the tokens that each step brings out, and the part of a core that serves them."""

    activity: Activity
    num_tokens: int
    served: float


class Host:
    """The instances of one host, and what each of them computes now.

    Without ``interference`` and ``serving`` none minds another.
    """

    def __init__(self, interference: Interference | None = None, serving: ServingCost | None = None) -> None:
        self._interference = interference
        self._serving = serving
        self._on_change: dict[InstanceId, Callable[[], None]] = {}
        self._computing: dict[InstanceId, _Computing] = {}

    def join(self, instance: InstanceId, on_change: Callable[[], None]) -> None:
        """Add an instance; ``on_change`` is called when a neighbour takes up, changes or ends what it computes."""
        self._on_change[instance] = on_change

    def set_activity(
        self, instance: InstanceId, activity: Activity | None, num_tokens: int = 0, step_s: float = math.inf
    ) -> None:
        """Note what an instance computes from now on, and tell its neighbours if that is news.

        Its steps bring out ``num_tokens`` each; the first such step takes ``step_s``, and stands for those after it.
        """
        if self._serving is None:
            num_tokens = 0
            if self._interference is None:
                return
        before = self._computing.get(instance)
        if activity is None:
            if before is None:
                return
            del self._computing[instance]
        else:
            if before is not None and (before.activity, before.num_tokens) == (activity, num_tokens):
                return
            served = 0.0 if self._serving is None else self._serving.work_s(num_tokens) / step_s
            self._computing[instance] = _Computing(activity, num_tokens, served)
        for neighbour, on_change in self._on_change.items():
            if neighbour != instance:
                on_change()

    def beside_neighbours(self, instance: InstanceId, alone: LatencyModel) -> LatencyModel:
        """Return the latency model of an instance for steps that begin now."""
        others = [computing for name, computing in self._computing.items() if name != instance]
        serving = self._serving
        if serving is not None and not serving.is_felt(len(others) + 1):
            serving = None
        if serving is None and not others:
            return alone
        neighbours = tuple(computing.activity for computing in others)
        served = 0.0 if serving is None else sum(computing.served for computing in others)
        return LatencyBeside(alone, self._interference, neighbours, serving, served)
