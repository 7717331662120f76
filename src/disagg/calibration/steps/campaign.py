"""A whole profile: scripts in random order, again and again, alone and beside a computing neighbour."""

import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from statistics import median
from typing import Final

import msgspec

from disagg.base.config import Device, InstanceSettings
from disagg.base.messages import InstanceFacts
from disagg.calibration.steps.profiled_instance import ProfiledInstance
from disagg.calibration.steps.script import (
    MeasuredStep,
    Script,
    ScriptLimits,
    ScriptResult,
    joined_steps,
    neighbour_scripts,
    standard_scripts,
)
from disagg.engine.benchmark.memory_reader import MemoryReader

START_DEADLINE_S: Final = 300.0
"""For loading the model, and for one script."""
_BESIDE_EVERY: Final = 3
"""One script in three is played again beside each kind of neighbour."""
_DISTURBED: Final = 0.05
"""A step beside a neighbour that had its core for less of the time than most, by this much, does not count."""
_NUM_PARTS: Final = 8
"""Into which the time of a series is cut, so that all series are spread over the whole campaign."""

OnProgress = Callable[[str, float], None]
"""Told what is being done and how much of it is, from 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class Campaign:
    """What to measure, and for how long.

    ``instance`` and ``neighbour`` are complete but for their control endpoints. Every script is played once at least,
    so a large model takes longer than ``alone_s`` and, for each kind of neighbour, ``beside_s``.
    """

    instance: InstanceSettings
    neighbour: InstanceSettings | None
    seed: int = 0
    quick: bool = False
    alone_s: float = 80.0
    beside_s: float = 24.0
    temperature: float = 0.0


@dataclass(frozen=True)
class MemoryReading:
    """Bytes per second that the instance's cores read from memory, alone and while the neighbour's read as well."""

    alone: float
    together: float


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What came of a campaign; the keys of ``beside`` are what the neighbour did, its values the parts of the time."""

    facts: InstanceFacts
    alone: tuple[MeasuredStep, ...]
    beside: dict[str, tuple["PartBeside", ...]]


@dataclass(frozen=True)
class PartBeside:
    """Steps beside a computing neighbour, and what memory gave just before and just after; nothing where not read."""

    steps: tuple[MeasuredStep, ...]
    memory: tuple[MemoryReading, ...] = ()


class MemoryReadings:
    """Takes readings on the cores of two instances; none where they do not compute on cores."""

    def __init__(self, campaign: "Campaign") -> None:
        self._taken: dict[str, list[MemoryReading]] = defaultdict(list)
        self._readers: tuple[MemoryReader, MemoryReader] | None = None
        instance, neighbour = campaign.instance, campaign.neighbour
        if neighbour is not None and instance.device is Device.CPU and instance.cpus and neighbour.cpus:
            self._readers = MemoryReader(instance.cpus), MemoryReader((*instance.cpus, *neighbour.cpus))

    def take(self, activity: str) -> None:
        """Take one, while neither instance computes: the neighbour is about to play ``activity``, or just did."""
        if self._readers is not None:
            alone, together = self._readers
            self._taken[activity].append(MemoryReading(alone.bytes_per_s(), together.bytes_per_s()))

    def of_parts(self, activity: str) -> Iterator[tuple[MemoryReading, ...]]:
        """Return the readings before and after each part of ``activity``; endlessly none where none are taken."""
        taken = self._taken[activity]
        return zip(taken[::2], taken[1::2], strict=True) if self._readers is not None else repeat(())


def measure(campaign: Campaign, on_progress: OnProgress) -> Measurement:
    """Start the instances, play the scripts, end the instances.

    Raises ConfigurationError when the model or a setting cannot be used.
    """
    rng = random.Random(campaign.seed)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="disagg-profile-"))
        instance = stack.enter_context(_start(campaign.instance, folder))
        neighbour = None
        if campaign.neighbour is not None:
            neighbour = stack.enter_context(_start(campaign.neighbour, folder))
        on_progress("loading", 0.0)
        facts = instance.wait_until_ready()
        limits = _limits(facts, campaign.instance)
        scripts = standard_scripts(limits, campaign.seed, campaign.quick, campaign.temperature)
        if neighbour is not None:
            neighbour.wait_until_ready()
        on_progress("loading", 1.0)
        instance.run(max(scripts, key=lambda script: sum(script.decode_contexts)))  # the first reads of the pool
        neighbour_plays = neighbour_scripts(limits)
        series: dict[str | None, Series] = {None: Series(scripts, campaign.alone_s, rng)}
        if neighbour is not None:
            again = rng.sample(scripts, -(-len(scripts) // _BESIDE_EVERY))
            series |= {activity: Series(again, campaign.beside_s, rng) for activity in neighbour_plays}
        readings = MemoryReadings(campaign)
        play_in_turns(series, instance, neighbour, neighbour_plays, on_progress, readings.take)
    return Measurement(
        facts=facts,
        alone=series[None].joined(),
        beside={
            activity: tuple(map(PartBeside, one.parts(), readings.of_parts(activity)))
            for activity, one in series.items()
            if activity is not None
        },
    )


def _start(settings: InstanceSettings, folder: str) -> ProfiledInstance:
    endpoint = f"ipc://{folder}/{settings.instance}"
    return ProfiledInstance(msgspec.structs.replace(settings, control_endpoint=endpoint), START_DEADLINE_S)


def _limits(facts: InstanceFacts, settings: InstanceSettings) -> ScriptLimits:
    return ScriptLimits(
        capacity_tokens=facts.pool_tokens,
        max_model_len=facts.max_model_len,
        max_batch_size=settings.scheduler.max_batch_size,
        block_size=facts.block_size,
    )


def play_in_turns(
    series: Mapping[str | None, "Series"],
    instance: ProfiledInstance,
    neighbour: ProfiledInstance | None,
    neighbour_plays: Mapping[str, Script],
    on_progress: OnProgress,
    beside: Callable[[str], None] = lambda activity: None,
) -> None:
    """Play part of each series, then the next part of each, until all are over.

    What a machine's other tenants leave of its memory bandwidth changes within a minute: every series meets all of it.
    ``beside`` is told what the neighbour computes just before it begins and after it has stopped.
    """
    while not all(one.is_over for one in series.values()):
        for activity, one in series.items():
            if one.is_over:
                continue
            if neighbour is not None and activity is not None:
                beside(activity)
                neighbour.run(neighbour_plays[activity])
            told = "steps alone" if activity is None else f"steps beside {activity}"
            one.play_part(instance, partial(on_progress, told))
            if neighbour is not None and activity is not None:
                neighbour.stop()
                beside(activity)


class Series:
    """Scripts that are played in rounds, each in a new random order, for ``at_least_s`` and once at least.

    A slow moment of the machine hits some repetition of some scripts, and the others make up for it.
    """

    def __init__(self, scripts: Sequence[Script], at_least_s: float, rng: random.Random) -> None:
        self._scripts = scripts
        self._at_least_s = at_least_s
        self._rng = rng
        self._parts: list[list[tuple[int, ScriptResult]]] = []
        self._order: list[int] = []
        self._num_played = 0
        self._played_s = 0.0

    @property
    def is_over(self) -> bool:
        """True when it has lasted long enough."""
        return self._progress() >= 1

    def play_part(self, instance: ProfiledInstance, on_progress: Callable[[float], None]) -> None:
        """Go on for one of ``_NUM_PARTS`` parts of the time."""
        until_s = self._played_s + self._at_least_s / _NUM_PARTS
        self._parts.append([])
        while True:
            self._play_next(instance)
            on_progress(self._progress())
            if self.is_over or self._played_s >= until_s:
                return

    def joined(self) -> tuple[MeasuredStep, ...]:
        """Return the repetitions of each step as one."""
        results: list[list[ScriptResult]] = [[] for _ in self._scripts]
        for index, result in chain.from_iterable(self._parts):
            results[index].append(result)
        return tuple(step for of_script in results for step in joined_steps(of_script))

    def parts(self) -> list[tuple[MeasuredStep, ...]]:
        """Return the steps of each part, without those that had their core less than the others did."""
        steps = [[step for _, result in part for step in joined_steps([result])] for part in self._parts]
        usual = median(step.on_core for part in steps for step in part)
        return [tuple(step for step in part if step.on_core >= usual - _DISTURBED) for part in steps]

    def _play_next(self, instance: ProfiledInstance) -> None:
        if not self._order:
            self._order = self._rng.sample(range(len(self._scripts)), len(self._scripts))
        index = self._order.pop()
        started_s = time.monotonic()
        self._parts[-1].append((index, instance.run(self._scripts[index])))
        self._played_s += time.monotonic() - started_s
        self._num_played += 1

    def _progress(self) -> float:
        of_time = self._played_s / self._at_least_s if self._played_s < self._at_least_s else 1.0
        return min(of_time, self._num_played / len(self._scripts))
