"""How well the fit of a profile predicts what it was not fitted to, and where it does not."""

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Final

import msgspec

from disagg.costs.contention import Activity, ServingCost
from disagg.costs.fit import FitError
from disagg.costs.latency import StepShape
from disagg.costs.measured_steps import (
    FittedLatency,
    HeldOut,
    fit_interference,
    fit_latency,
    hold_out,
    interference_errors,
)
from disagg.costs.memory import Scarcity
from disagg.costs.profile import ParallelSamples, Profile
from disagg.costs.profiled_platform import ProfiledPlatform

NUM_WORST: Final = 5
LONE_DECODE: Final = StepShape(num_decodes=1, decode_context=512, num_samples=1)
PROMPT: Final = StepShape(num_prefills=1, num_prefill_tokens=512, prefill_squares=512**2, num_samples=1)


class StepError(msgspec.Struct, frozen=True, kw_only=True):
    """One held-out step and what the fit says of it; ``error`` is prediction over measurement, less 1."""

    num_prefills: int
    num_prefill_tokens: int
    num_decodes: int
    mean_decode_context: float
    measured_s: float
    predicted_s: float
    error: float


class NeighbourCost(msgspec.Struct, frozen=True, kw_only=True):
    """What a neighbour's activity adds to a step, to each new token and to each token of decode context.

    ``error`` is that of the fit to the steps beside it, and ``error_in_the_mean`` that without regard to the memory
    bandwidth that was read beside each.
    """

    activity: Activity
    num_samples: int
    step_s: float
    token_s: float
    context_token_s: float
    lengthening: float
    """Mean time of the steps measured beside it over that predicted for the same steps alone, less 1."""
    error: FitError
    error_in_the_mean: FitError


class MemorySummary(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes per second that the cores of one instance read, and those of two at once: least, mean, most.

    ``added_s`` is what a decoding neighbour adds to a step of one sequence (context 512) where it is least and most.
    """

    alone: float
    together: tuple[float, float, float]
    added_s: tuple[float, float]


class ThreadsSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What a profile holds of instances of one number of threads, and how far it can be believed.

    ``lone_decode_s`` is a step of one sequence (context 512), ``prompt_s`` one of a prompt of 512 tokens, by the fit.
    """

    num_threads: int | None
    num_samples: int
    lone_decode_s: float
    prompt_s: float
    held_out: FitError
    worst: tuple[StepError, ...]
    neighbours: tuple[NeighbourCost, ...]
    memory: MemorySummary | None
    """What cores read from memory in the profile; None where that was not measured."""


class ProfileSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What a profile holds and how far it can be believed; ``by_threads`` has the fewest threads first."""

    file: str
    model: str
    device: str
    dtype: str
    by_threads: tuple[ThreadsSummary, ...]
    link_bytes_per_s: float
    link_latency_s: float
    digest_bytes_per_s: float | None
    accept_s: float
    message_s: float
    deliver_s: float
    serving: ServingCost | None
    """CPU time that serving takes from instances which use all cores; None where it was not measured."""


def summarise(profile: Profile, path: Path) -> ProfileSummary:
    """Fit the profile and compare."""
    platform = ProfiledPlatform(profile, kv_memory_bytes=1)
    return ProfileSummary(
        file=str(path),
        model=profile.model,
        device=profile.device,
        dtype=profile.dtype,
        by_threads=tuple(_of_threads(steps) for steps in profile.steps),
        link_bytes_per_s=profile.link_bytes_per_s,
        link_latency_s=profile.link_latency_s,
        digest_bytes_per_s=profile.digest_bytes_per_s,
        accept_s=profile.accept_s,
        message_s=profile.message_s,
        deliver_s=profile.deliver_s,
        serving=platform.serving,
    )


def _of_threads(steps: ParallelSamples) -> ThreadsSummary:
    latency, error = fit_latency(steps.samples)
    worst = sorted(hold_out(steps.samples), key=lambda one: -abs(one.relative_error))[:NUM_WORST]
    return ThreadsSummary(
        num_threads=steps.num_threads,
        num_samples=len(steps.samples),
        lone_decode_s=latency.stage_times_s(LONE_DECODE)[0],
        prompt_s=latency.stage_times_s(PROMPT)[0],
        held_out=error,
        worst=tuple(_step_error(one) for one in worst),
        neighbours=tuple(_neighbours(steps, latency)),
        memory=_memory_summary(steps, latency),
    )


def _neighbours(steps: ParallelSamples, latency: FittedLatency) -> Iterator[NeighbourCost]:
    samples, scarcity = steps.samples, Scarcity.of(steps.memory)
    errors = interference_errors(samples, latency, scarcity)
    in_the_mean = interference_errors(samples, latency)
    for activity, added in fit_interference(samples, latency, scarcity).coefficients.items():
        beside = [sample for sample in samples if sample.neighbour is activity]
        ratios = [sample.time_s / latency.stage_times_s(sample.shape())[0] for sample in beside]
        yield NeighbourCost(
            activity=activity,
            num_samples=len(beside),
            step_s=added[0],
            token_s=added[1],
            context_token_s=added[2],
            lengthening=sum(ratios) / len(ratios) - 1,
            error=errors[activity],
            error_in_the_mean=in_the_mean[activity],
        )


def _memory_summary(steps: ParallelSamples, latency: FittedLatency) -> MemorySummary | None:
    scarcity = Scarcity.of(steps.memory)
    if scarcity is None:
        return None
    together = [reading.together for reading in steps.memory]

    def added_s(at: float) -> float:
        interference = fit_interference(steps.samples, latency, Scarcity.of(steps.memory, (at,)))
        return interference.added_s(Activity.DECODE, LONE_DECODE)

    return MemorySummary(
        alone=scarcity.alone,
        together=(min(together), fmean(together), max(together)),
        added_s=(added_s(min(together)), added_s(max(together))),
    )


def _step_error(one: HeldOut) -> StepError:
    shape = one.sample.shape()
    return StepError(
        num_prefills=shape.num_prefills,
        num_prefill_tokens=shape.num_prefill_tokens,
        num_decodes=shape.num_decodes,
        mean_decode_context=shape.decode_context / shape.num_decodes if shape.num_decodes else 0.0,
        measured_s=one.sample.time_s,
        predicted_s=one.predicted_s,
        error=one.relative_error,
    )
