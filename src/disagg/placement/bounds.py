"""What an instance can serve at most, by arithmetic alone: cuts candidates before they are simulated.

A bound is generous: batches as full as the rules let them be, no waiting. What it rules out, no schedule can save.
"""

from dataclasses import dataclass
from typing import Final

from disagg.base.config import SchedulingMode
from disagg.base.request import Role
from disagg.costs.latency import LatencyModel, Pipeline, StepShape
from disagg.measure.slo import SloTarget
from disagg.placement.problem import LengthSample
from disagg.placement.shapes import BuiltChoice
from disagg.scheduling.by_objectives import scheduling_mode

_MANY_SEQUENCES: Final = 4096
FULL_PREFILL: Final = 4096
"""Tokens of prefill in a step beyond which a device makes no more of them."""
_TOLERANCE: Final = 1.02
"""What a limit may be missed by before it rules a choice out: figures of a step are not exact either."""

_COLOCATED_SLACK: Final = 1.15
"""Steps of both phases overlap what they wait for more than the sum of their parts tells."""


@dataclass(frozen=True)
class Bound:
    """The highest rate in requests/s that one instance could serve in its phase, and what sets it."""

    rate: float
    limited_by: str


def phase_bound(built: BuiltChoice, sample: LengthSample, target: SloTarget) -> Bound:
    """Return the bound of a prefill, a decode or a colocated instance; rate 0 where an objective cannot be kept."""
    role = built.choice.role
    if role is not Role.DECODE:
        prompt = sample.prompt_quantile(target.attainment)
        lone_s = lone_prefill_s(built, prompt)
        if lone_s > target.slo.ttft_s * _TOLERANCE:
            return Bound(0.0, f"a lone prompt of {prompt} tokens takes {lone_s * 1e3:.0f} ms")
    if role is Role.PREFILL:
        return _prefill_bound(built, sample)
    lone_s = token_s(built.latency, 1, sample.mean_held)
    if lone_s > target.slo.tpot_s * _TOLERANCE:
        return Bound(0.0, f"a lone decode step takes {lone_s * 1e3:.1f} ms")
    decode = _decode_bound(built, sample, target.slo.tpot_s)
    return decode if role is Role.DECODE else _colocated_bound(built, sample, target, decode)


def lone_prefill_s(built: BuiltChoice, prompt_len: int) -> float:
    """Return how long a prompt takes on an idle instance, in chunks of the token budget where it is cut."""
    scheduler = built.scheduler
    whole = scheduling_mode(scheduler) is SchedulingMode.PREFILL_FIRST or scheduler.max_batch_tokens >= prompt_len
    chunk = prompt_len if whole else scheduler.max_batch_tokens
    pipeline = Pipeline(built.latency.num_stages)
    start, end_s, begin_s = 0, 0.0, 0.0
    while start < prompt_len:
        shape = StepShape()
        shape.add_prefill(start, min(chunk, prompt_len - start), samples=start + chunk >= prompt_len)
        end_s = pipeline.enter(begin_s, built.latency.stage_times_s(shape))
        if built.latency.num_stages == 1:
            begin_s = end_s
        start += chunk
    return end_s


def token_s(latency: LatencyModel, num_sequences: int, held: float) -> float:
    """Return the time between two tokens of each of so many sequences, which hold ``held`` tokens in the mean.

    A pipeline has a part of them in each stage, and each part must pass all.
    """
    stages = latency.num_stages
    part = max(1.0, num_sequences / stages)
    times = latency.stage_times_s(decode_shape(part, held))
    return max(sum(times), min(num_sequences, stages) * max(times))


def decode_shape(num_sequences: float, held: float) -> StepShape:
    """Return a step of so many decodes, whole or a mean."""
    count = max(1, round(num_sequences))
    return StepShape(num_decodes=count, decode_context=round(num_sequences * held), num_samples=count)


def prefill_shape(num_prompts: float, sample: LengthSample) -> StepShape:
    """Return a step of so many whole prompts of the workload."""
    return StepShape(
        num_prefills=max(1, round(num_prompts)),
        num_prefill_tokens=round(num_prompts * sample.mean_prompt),
        prefill_squares=round(num_prompts * sample.mean_prompt_square),
        num_samples=max(1, round(num_prompts)),
    )


def _prefill_bound(built: BuiltChoice, sample: LengthSample) -> Bound:
    """Full steps, one after the other: the slowest stage sets the pace."""
    num_prompts = max(1.0, built.scheduler.max_batch_tokens / sample.mean_prompt)
    num_prompts = min(num_prompts, built.scheduler.max_batch_size, built.capacity / sample.mean_prompt)
    step_s = max(built.latency.stage_times_s(prefill_shape(num_prompts, sample)))
    return Bound(num_prompts / step_s, "computing prompts")


def _decode_bound(built: BuiltChoice, sample: LengthSample, tpot_s: float) -> Bound:
    """As many sequences as memory holds and the objective allows, always."""
    held = sample.mean_held
    most = min(built.capacity / held, built.scheduler.max_batch_size * built.latency.num_stages, _MANY_SEQUENCES)
    limited_by = "KV memory" if built.capacity / held <= most else "the batch size"
    count = max(1, int(most))
    if token_s(built.latency, count, held) > tpot_s * _TOLERANCE:
        limited_by = "decode steps"
        count = _most_sequences(built.latency, held, tpot_s * _TOLERANCE, count)
    steps = max(1.0, sample.mean_output - 1)
    return Bound(count / (steps * token_s(built.latency, count, held)), limited_by)


def _most_sequences(latency: LatencyModel, held: float, tpot_s: float, above: int) -> int:
    low, high = 1, above
    while high - low > 1:
        middle = (low + high) // 2
        if token_s(latency, middle, held) <= tpot_s:
            low = middle
        else:
            high = middle
    return low


def _colocated_bound(built: BuiltChoice, sample: LengthSample, target: SloTarget, decode: Bound) -> Bound:
    """Prompts and decodes share the steps: each request takes its prefill and its tokens' part of full batches."""
    fixed_s = max(built.latency.stage_times_s(decode_shape(1, sample.mean_held)))
    num_prompts = max(1.0, max(FULL_PREFILL, built.scheduler.max_batch_tokens) / sample.mean_prompt)
    work_s = max(built.latency.stage_times_s(prefill_shape(num_prompts, sample)))
    # Decodes beside a prompt read the weights with it: what a step takes anyway is counted once.
    prompt_s = max(0.0, work_s - fixed_s) / num_prompts
    rate = min(1 / prompt_s if prompt_s > 0 else decode.rate, decode.rate)
    # Of each TPOT, one step's fixed part at least is gone.
    stages = built.latency.num_stages
    batch = max(2, round(decode.rate * sample.mean_output * min(target.slo.tpot_s, 1.0) / stages))
    full_s = max(built.latency.stage_times_s(decode_shape(batch, sample.mean_held)))
    token_cost_s = max(0.0, full_s - fixed_s) / (batch - 1)
    per_request_s = prompt_s + token_cost_s * max(0.0, sample.mean_output - 1)
    free = 1 - min(1.0, fixed_s * stages / target.slo.tpot_s) if target.slo.tpot_s < float("inf") else 1.0
    if per_request_s > 0:
        rate = min(rate, free / per_request_s)
    return Bound(rate * _COLOCATED_SLACK, "prompts and decodes in the same steps")
