"""What a prefill instance would serve if prompts were computed one by one, first come first served.

With constant prompts and Poisson arrivals that is the M/D/1 queue of DistServe (section 3.1); here the workload's own
lengths and bursts go through it. Full steps do better where objectives are loose, so it is an estimate and no bound.
"""

from typing import Final

from disagg.costs.latency import StepShape
from disagg.measure.slo import SloTarget
from disagg.placement.bounds import lone_prefill_s
from disagg.placement.problem import LengthSample
from disagg.placement.shapes import BuiltChoice

_HALVINGS: Final = 12


def prefill_estimate(built: BuiltChoice, sample: LengthSample, target: SloTarget, most_rate: float) -> float:
    """Return the highest rate in requests/s, ``most_rate`` at most, at which enough prompts keep the TTFT."""
    lone = {length: lone_prefill_s(built, length) for length in set(sample.prompts)}
    busy = {length: _busy_s(built, length) for length in lone}
    low, high = 0.0, most_rate
    for _ in range(_HALVINGS):
        rate = (low + high) / 2
        if _attainment(sample, lone, busy, rate, target.slo.ttft_s) >= target.attainment:
            low = rate
        else:
            high = rate
    return low


def _busy_s(built: BuiltChoice, prompt_len: int) -> float:
    """Return how long a prompt keeps the slowest stage."""
    shape = StepShape()
    shape.add_prefill(0, prompt_len)
    return max(built.latency.stage_times_s(shape))


def _attainment(
    sample: LengthSample, lone: dict[int, float], busy: dict[int, float], rate: float, ttft_s: float
) -> float:
    """Return the part of the prompts that are in time (Lindley's recursion)."""
    free_at_s = 0.0
    num_met = 0
    for arrival, length in zip(sample.arrivals, sample.prompts, strict=True):
        begin_s = max(arrival / rate, free_at_s)
        free_at_s = begin_s + busy[length]
        num_met += begin_s + lone[length] - arrival / rate <= ttft_s
    return num_met / len(sample.prompts)
