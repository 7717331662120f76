"""Instances of one host slow one another down: they share its memory bandwidth, its last-level cache, and its cores.

What a neighbour computes is one of three things: nothing, a step with prefill in it, or a step of decodes alone. Each
computing neighbour adds to a step what it did add in measurements, by what it computes when the step begins.

The cores are shared with what serves: API, router, the kernel's sockets and the clients of this machine. A request
makes them some work when it arrives, and so does each step that brings out tokens. A core on which no instance computes
does it unnoticed; where there is none, the computing instances lose that time in equal parts. But what served on an
idle core stays there for a while when an instance begins to compute on it, and until then that instance pays all.
"""

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from disagg.base.ids import InstanceId
from disagg.costs.latency import LatencyModel, StepShape

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

    A request that arrives makes ``request_s``, and ``prompt_token_s`` for each token of its prompt. ``num_cores`` are
    those that the server may use. ``spread_s`` passes from an instance's begin to compute until the operating system
    has moved what served on its core.
    """

    step_s: float
    token_s: float
    num_cores: int
    request_s: float = 0.0
    prompt_token_s: float = 0.0
    spread_s: float = 0.0

    def is_felt(self, num_threads: int) -> bool:
        """Return whether so many computing threads, of all instances, leave no core for what serves."""
        return self.num_cores <= num_threads

    def work_s(self, num_tokens: int) -> float:
        """Return what a step that brings out so many tokens costs."""
        return self.step_s + self.token_s * num_tokens if num_tokens else 0.0

    def request_work_s(self, prompt_len: int) -> float:
        """Return what the arrival of a request costs."""
        return self.request_s + self.prompt_token_s * prompt_len


@dataclass(frozen=True)
class ServingShare:
    """What an instance pays of serving: a ``part`` of its own steps' work and of the neighbours'.

    Theirs takes ``neighbours`` of one core's time; ``owed_s`` is this instance's part of what requests made.
    """

    cost: ServingCost
    part: float
    neighbours: float = 0.0
    owed_s: float = 0.0


@dataclass(frozen=True)
class LatencyBeside:
    """A latency model of an instance beside neighbours that compute. See ``LatencyModel``."""

    alone: LatencyModel
    interference: Interference | None
    neighbours: tuple[Activity, ...]
    serving: ServingShare | None = None

    @property
    def num_stages(self) -> int:
        """See ``LatencyModel``."""
        return self.alone.num_stages

    @property
    def is_for_one_step(self) -> bool:
        """True when the step after this one costs less: what requests made is paid."""
        return self.serving is not None and self.serving.owed_s > 0

    def stage_times_s(self, shape: StepShape) -> tuple[float, ...]:
        """See ``LatencyModel``."""
        added_s, own_part = 0.0, 1.0
        if self.interference is not None:
            added_s = sum(self.interference.added_s(neighbour, shape) for neighbour in self.neighbours)
        if self.serving is not None:
            part = self.serving.part
            added_s += self.serving.cost.work_s(shape.num_samples) * part + self.serving.owed_s
            own_part = 1 - min(self.serving.neighbours, _MOST_SERVED) * part
        return tuple((time_s + added_s / self.num_stages) / own_part for time_s in self.alone.stage_times_s(shape))


@dataclass(frozen=True)
class LatencyOnMore:
    """A latency model of steps that may take cores of others in, and are never slower for that. See ``LatencyModel``.

    Both have a single stage.
    """

    own: LatencyModel
    wider: LatencyModel

    @property
    def num_stages(self) -> int:
        """See ``LatencyModel``."""
        return 1

    @property
    def is_for_one_step(self) -> bool:
        """See ``LatencyBeside``."""
        return any(isinstance(one, LatencyBeside) and one.is_for_one_step for one in (self.own, self.wider))

    def stage_times_s(self, shape: StepShape) -> tuple[float, ...]:
        """See ``LatencyModel``."""
        return min(self.own.stage_times_s(shape), self.wider.stage_times_s(shape))


@dataclass(frozen=True)
class _Computing:
    """What an instance computes, the tokens that each step brings out, and the part of a core that serves them.

    It has computed without pause for so long that serving is spread evenly at ``spread_at_s``.
    """

    activity: Activity
    num_tokens: int
    served: float
    spread_at_s: float


class HostContention:
    """The instances of one host, what each of them computes now, and what that costs the others. Pure: no clock.

    Whoever holds it asks ``latency`` when a step begins, and again for the instances that the other methods return:
    their steps take more or less time from now on. Without ``interference`` and ``serving`` none minds another.
    """

    def __init__(self, interference: Interference | None = None, serving: ServingCost | None = None) -> None:
        self._interference = interference
        self._serving = serving
        self._num_threads: dict[InstanceId, int] = {}
        self._num_borrowed: dict[InstanceId, int] = {}
        self._computing: dict[InstanceId, _Computing] = {}
        self._owed_s: dict[InstanceId, float] = {}

    def join(self, instance: InstanceId, num_threads: int = 1) -> None:
        """Add an instance, which computes on so many cores."""
        self._num_threads[instance] = num_threads

    def set_borrowed(self, instance: InstanceId, number: int) -> None:
        """Note on how many cores of others an instance computes, while it does: they are busy as well as its own."""
        self._num_borrowed[instance] = number

    def spread_at_s(self, instance: InstanceId) -> float | None:
        """Return when all that ``instances`` pay changes because this one has computed for long; None: it does not."""
        computing = self._computing.get(instance)
        return None if computing is None or self._serving is None else computing.spread_at_s

    def set_activity(
        self,
        instance: InstanceId,
        activity: Activity | None,
        now: float,
        num_tokens: int = 0,
        step_s: float = math.inf,
    ) -> Sequence[InstanceId]:
        """Note what an instance computes from ``now`` on; return the neighbours to whom that is news.

        Its steps bring out ``num_tokens`` each; the first such step takes ``step_s``, and stands for those after it.
        """
        if self._serving is None:
            num_tokens = 0
            if self._interference is None:
                return ()
        before = self._computing.get(instance)
        if activity is None:
            if before is None:
                return ()
            del self._computing[instance]
            self._owed_s.pop(instance, None)  # an idle core does it
        else:
            if before is not None and (before.activity, before.num_tokens) == (activity, num_tokens):
                return ()
            self._computing[instance] = self._begin(before, activity, num_tokens, step_s, now)
        return [name for name in self._num_threads if name != instance]

    def arrive(self, prompt_len: int, now: float) -> Sequence[InstanceId]:
        """Note that a request arrives; return who pays for what that makes, and takes longer over a step."""
        serving = self._serving
        if serving is None or not serving.is_felt(self._computing_threads()):
            return ()
        payers = self._payers(now)
        part_s = serving.request_work_s(prompt_len) / len(payers)
        for instance in payers:
            self._owed_s[instance] = self._owed_s.get(instance, 0.0) + part_s
        return payers

    def latency(self, instance: InstanceId, alone: LatencyModel, now: float) -> LatencyModel:
        """Return the latency model of an instance for steps that begin now; the first of them pays what is owed."""
        owed_s = self._owed_s.pop(instance, 0.0)
        return self._beside(instance, alone, self._computing_threads(instance), owed_s, now)

    def latencies(self, instance: InstanceId, alone: Mapping[int, LatencyModel], now: float) -> dict[int, LatencyModel]:
        """Return what ``latency`` does for each number of cores that an instance may borrow, 0 among them.

        Whatever it borrows, the first step pays what is owed once.
        """
        owed_s = self._owed_s.pop(instance, 0.0)
        others = self._computing_threads(instance) - self._num_borrowed.get(instance, 0)
        beside = {
            number: self._beside(instance, latency, others + number, owed_s, now) for number, latency in alone.items()
        }
        return {number: LatencyOnMore(beside[0], latency) if number else latency for number, latency in beside.items()}

    def _beside(
        self, instance: InstanceId, alone: LatencyModel, num_threads: int, owed_s: float, now: float
    ) -> LatencyModel:
        """Return a latency model for steps that begin now, while so many threads compute."""
        others = [computing for name, computing in self._computing.items() if name != instance]
        serving = self._serving_share(instance, num_threads, owed_s, now)
        if serving is None and not others:
            return alone
        return LatencyBeside(alone, self._interference, tuple(other.activity for other in others), serving)

    def _begin(
        self, before: _Computing | None, activity: Activity, num_tokens: int, step_s: float, now: float
    ) -> _Computing:
        serving = self._serving
        if serving is None:
            return _Computing(activity, num_tokens, served=0.0, spread_at_s=now)
        spread_at_s = now + serving.spread_s if before is None else before.spread_at_s
        return _Computing(activity, num_tokens, serving.work_s(num_tokens) / step_s, spread_at_s)

    def _serving_share(self, instance: InstanceId, num_threads: int, owed_s: float, now: float) -> ServingShare | None:
        cost = self._serving
        if cost is None or not cost.is_felt(num_threads):
            return None  # what was owed, a free core has done
        payers = self._payers(now, instance)
        part = 1 / len(payers) if instance in payers else 0.0
        served = sum(other.served for name, other in self._computing.items() if name != instance)
        return ServingShare(cost, part, served, owed_s)

    def _computing_threads(self, beginning: InstanceId | None = None) -> int:
        """Return the threads of all instances that compute, and of the one that begins to, borrowed cores' included."""
        computing = self._computing.keys() if beginning is None else {*self._computing, beginning}
        return sum(self._num_threads.get(name, 1) + self._num_borrowed.get(name, 0) for name in computing)

    def _payers(self, now: float, beginning: InstanceId | None = None) -> list[InstanceId]:
        """Return the instances on whose cores serving is done: all that compute, or those that began lately.

        ``beginning`` computes from now on, if it did not already.
        """
        new = [name for name, computing in self._computing.items() if now < computing.spread_at_s]
        everyone = list(self._computing)
        if beginning is not None and beginning not in self._computing:
            new.append(beginning)
            everyone.append(beginning)
        return new or everyone
