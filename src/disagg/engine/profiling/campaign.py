"""A whole profile: scripts in random order, again and again, alone and beside a computing neighbour."""

import random
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

import msgspec

from disagg.base.config import InstanceSettings
from disagg.base.messages import InstanceFacts
from disagg.engine.profiling.process import ProfiledInstance
from disagg.engine.profiling.script import (
    MeasuredPull,
    MeasuredStep,
    Script,
    ScriptLimits,
    ScriptResult,
    joined_steps,
    neighbour_scripts,
    standard_scripts,
)

START_DEADLINE_S: Final = 300.0
"""For loading the model, and for one script."""
_BESIDE_EVERY: Final = 3
"""One script in three is played again beside each kind of neighbour."""

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
    beside_s: float = 16.0
    temperature: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What came of a campaign; the keys of ``beside`` are what the neighbour did."""

    facts: InstanceFacts
    alone: tuple[MeasuredStep, ...]
    beside: dict[str, tuple[MeasuredStep, ...]]
    pulls: tuple[MeasuredPull, ...]


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
        results = _play(instance, scripts, campaign.alone_s, rng, "steps alone", on_progress)
        beside = {}
        if neighbour is not None:
            again = rng.sample(scripts, -(-len(scripts) // _BESIDE_EVERY))
            for activity, script in neighbour_scripts(limits).items():
                neighbour.run(script)
                told = f"steps beside {activity}"
                beside[activity] = _play(instance, again, campaign.beside_s, rng, told, on_progress)
                neighbour.stop()
    return Measurement(
        facts=facts,
        alone=_joined(results),
        beside={activity: _joined(results) for activity, results in beside.items()},
        pulls=tuple(pull for of_script in results for result in of_script for pull in result.pulls),
    )


def _start(settings: InstanceSettings, folder: str) -> ProfiledInstance:
    endpoint = f"ipc://{folder}/{settings.instance}"
    return ProfiledInstance(msgspec.structs.replace(settings, control_endpoint=endpoint), START_DEADLINE_S)


def _limits(facts: InstanceFacts, settings: InstanceSettings) -> ScriptLimits:
    return ScriptLimits(
        capacity_tokens=facts.num_blocks * facts.block_size,
        max_model_len=facts.max_model_len,
        max_batch_size=settings.scheduler.max_batch_size,
        block_size=facts.block_size,
    )


def _play(
    instance: ProfiledInstance,
    scripts: Sequence[Script],
    at_least_s: float,
    rng: random.Random,
    told: str,
    on_progress: OnProgress,
) -> list[list[ScriptResult]]:
    """Play all scripts in rounds, each in a new order, until the time is over; return each script's results.

    A slow moment of the machine hits some repetition of some scripts, and the others make up for it.
    """
    results: list[list[ScriptResult]] = [[] for _ in scripts]
    started_s = time.monotonic()
    num_played = 0
    while True:
        for index in rng.sample(range(len(scripts)), len(scripts)):
            results[index].append(instance.run(scripts[index]))
            num_played += 1
            elapsed_s = time.monotonic() - started_s
            of_time = elapsed_s / at_least_s if elapsed_s < at_least_s else 1.0
            on_progress(told, min(1.0, of_time, num_played / len(scripts)))
            if of_time >= 1 and num_played >= len(scripts):
                return results


def _joined(results: Sequence[Sequence[ScriptResult]]) -> tuple[MeasuredStep, ...]:
    return tuple(step for of_script in results for step in joined_steps(of_script))
