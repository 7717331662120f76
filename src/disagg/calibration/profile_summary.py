"""How well the fit of a profile predicts what it was not fitted to, and where it does not."""

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
from disagg.costs.profile import Profile, ProfiledPlatform

NUM_WORST: Final = 5
LONE_DECODE: Final = StepShape(num_decodes=1, decode_context=512, num_samples=1)


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


class ProfileSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What a profile holds and how far it can be believed."""

    file: str
    model: str
    device: str
    dtype: str
    num_threads: int | None
    num_samples: int
    held_out: FitError
    worst: tuple[StepError, ...]
    neighbours: tuple[NeighbourCost, ...]
    memory: MemorySummary | None
    """What cores read from memory in the profile; None where that was not measured."""
    link_bytes_per_s: float
    link_latency_s: float
    accept_s: float
    message_s: float
    deliver_s: float
    serving: ServingCost | None
    """CPU time that steps with tokens take from the instances; None where a core was left for it."""


def summarise(profile: Profile, path: Path) -> ProfileSummary:
    """Fit the profile and compare."""
    samples = profile.steps[0].samples
    latency, error = fit_latency(samples)
    platform = ProfiledPlatform(profile, kv_memory_bytes=1)
    worst = sorted(hold_out(samples), key=lambda one: -abs(one.relative_error))[:NUM_WORST]
    scarcity = Scarcity.of(profile.memory)
    errors = interference_errors(samples, latency, scarcity)
    in_the_mean = interference_errors(samples, latency)
    neighbours = []
    for activity, added in platform.interference.coefficients.items() if platform.interference else ():
        beside = [sample for sample in samples if sample.neighbour is activity]
        ratios = [sample.time_s / latency.stage_times_s(sample.shape())[0] for sample in beside]
        neighbours.append(
            NeighbourCost(
                activity=activity,
                num_samples=len(beside),
                step_s=added[0],
                token_s=added[1],
                context_token_s=added[2],
                lengthening=sum(ratios) / len(ratios) - 1,
                error=errors[activity],
                error_in_the_mean=in_the_mean[activity],
            )
        )
    return ProfileSummary(
        file=str(path),
        model=profile.model,
        device=profile.device,
        dtype=profile.dtype,
        num_threads=profile.num_threads,
        num_samples=len(samples),
        held_out=error,
        worst=tuple(_step_error(one) for one in worst),
        neighbours=tuple(neighbours),
        memory=_memory_summary(profile, latency),
        link_bytes_per_s=profile.link_bytes_per_s,
        link_latency_s=profile.link_latency_s,
        accept_s=profile.accept_s,
        message_s=profile.message_s,
        deliver_s=profile.deliver_s,
        serving=platform.serving,
    )


def _memory_summary(profile: Profile, latency: FittedLatency) -> MemorySummary | None:
    scarcity = Scarcity.of(profile.memory)
    if scarcity is None:
        return None
    together = [reading.together for reading in profile.memory]

    def added_s(at: float) -> float:
        interference = fit_interference(profile.steps[0].samples, latency, Scarcity.of(profile.memory, (at,)))
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
