"""What prefill and decode take by the coefficients of a step's parts (``StepCosts``). Pure."""

from typing import Final

from msgspec.structs import astuple

from disagg.base.messages import StepCosts
from disagg.costs.latency import StepShape

PRIOR_COSTS: Final = StepCosts(step_s=5e-3, token_s=3e-4, square_s=5e-8, prefill_s=1e-3, context_s=2e-6, decode_s=5e-4)
"""A small model on one CPU core, until steps have shown other costs."""


def prefill_work_s(costs: StepCosts, num_tokens: int, squares: int, num_prompts: int) -> float:
    """Return the seconds of prompts of so many tokens in sum, and of so many squares; those of steps left out."""
    return costs.token_s * num_tokens + costs.square_s * squares + costs.prefill_s * num_prompts


def decode_work_s(costs: StepCosts, num_decodes: float, context: float) -> float:
    """Return the seconds that decodes with so many tokens of context in sum add to a step."""
    return (costs.token_s + costs.decode_s) * num_decodes + costs.context_s * context


def at_speed(costs: StepCosts, speed: float) -> StepCosts:
    """Return what steps cost that are so many times as fast in all their parts."""
    return StepCosts(*(part / speed for part in astuple(costs)))


def step_time_s(costs: StepCosts, shape: StepShape) -> float:
    """Return the seconds of a whole step."""
    prefill_s = prefill_work_s(costs, shape.num_prefill_tokens, shape.prefill_squares, shape.num_prefills)
    return costs.step_s + prefill_s + decode_work_s(costs, shape.num_decodes, shape.decode_context)
