"""Step times of a profile's model on any number of threads: those that were measured, else an estimate from them.

Between two measured numbers of threads the time of a step falls by the same factor with each doubling. Beyond them, a
step is arithmetic, which cores share evenly, or waits for memory, which they read together as fast as the profile saw
two instances read it: the slower of the two is taken for the whole step.
"""

import math
from bisect import bisect_left
from dataclasses import replace
from statistics import median
from typing import Final

from msgspec import structs

from disagg.base.errors import ConfigurationError
from disagg.costs.measured_steps import FittedLatency, fit_latency
from disagg.costs.profile import ParallelSamples, Profile

_EFFICIENCY: Final = 0.95
"""Of threads that share a step: what waits for the slowest is lost. 0.95 on two cores (docs/engine.md)."""


def latency_at(
    profile: Profile, num_threads: int | None = None, tensor_parallel: int = 1, pipeline_parallel: int = 1
) -> FittedLatency:
    """Return the step times of an instance of so many threads; None: of the fewest that were measured.

    A profile of a device takes no notice of threads. Raises ConfigurationError where it has no such parallelism.
    """
    measured = _by_threads(profile, tensor_parallel)
    known = sorted(measured)
    if num_threads is None or measured[known[0]].num_threads is None:
        num_threads = known[0]
    place = bisect_left(known, num_threads)
    if num_threads in measured:
        latency = _fit(measured[num_threads])
    elif 0 < place < len(known):
        fewer, more = known[place - 1], known[place]
        latency = _between(measured[fewer], measured[more], math.log(num_threads / fewer) / math.log(more / fewer))
    else:
        nearest = known[max(place - 1, 0)]
        factor = _factor(measured, nearest, num_threads)
        latency = _fit(measured[nearest])
        latency = replace(latency, coefficients=tuple(factor * one for one in latency.coefficients))
    return replace(latency, num_stages=pipeline_parallel)


def samples_near(profile: Profile, num_threads: int | None) -> ParallelSamples | None:
    """Return what was measured of instances of one device: of so many threads, or else of the next fewer.

    The fewest where there are none fewer; None where only other parallelisms were measured.
    """
    single = {steps.num_threads or 1: steps for steps in profile.steps if steps.tensor_parallel == 1}
    if not single:
        return None
    fewer = [number for number in single if number <= (num_threads or 1)]
    return single[max(fewer) if fewer else min(single)]


def estimate_words(profile: Profile, num_threads: int) -> str | None:
    """Return from what step times on so many threads are estimated, for people; None where they were measured."""
    known = profile.threads
    if not known or num_threads in known:
        return None
    listed = ", ".join(map(str, known))
    return f"step times on {num_threads} thread(s) are an estimate: the profile has those on {listed} (--threads)"


def _fit(steps: ParallelSamples) -> FittedLatency:
    latency, _ = fit_latency(steps.samples)
    return latency


def _between(fewer: ParallelSamples, more: ParallelSamples, way: float) -> FittedLatency:
    """Fit to the steps of fewer threads, each ``way`` (0 to 1) of the way to its time on more, in logarithms."""
    on_more = _fit(more)
    estimated = [
        structs.replace(step, time_s=step.time_s ** (1 - way) * on_more.stage_times_s(step.shape())[0] ** way)
        for step in fewer.samples
        if step.neighbour is None
    ]
    latency, _ = fit_latency(estimated)
    return latency


def _by_threads(profile: Profile, tensor_parallel: int) -> dict[int, ParallelSamples]:
    """Return what was measured at a tensor parallelism, by threads; a device's counts as one."""
    found = {one.num_threads or 1: one for one in profile.steps if one.tensor_parallel == tensor_parallel}
    if not found:
        measured = ", ".join(str(number) for number in sorted({one.tensor_parallel for one in profile.steps}))
        raise ConfigurationError(
            f"the profile of {profile.model} has no steps at tensor parallelism {tensor_parallel}, only at "
            f"{measured}: profile it, or change the placement"
        )
    return found


def _factor(measured: dict[int, ParallelSamples], nearest: int, wanted: int) -> float:
    """Return step time on the threads wanted over that on the nearest that were measured."""
    wider = wanted / nearest
    if wider < 1:
        return _EFFICIENCY / wider
    # Two instances read ``together``; more cores than theirs are taken to read no more.
    readings = next((measured[number].memory for number in sorted(measured) if measured[number].memory), ())
    read = median(one.alone / one.together for one in readings) if readings else 0.0
    return max(1 / wider, min(read, 1.0)) / _EFFICIENCY
