"""Bounds: by hand in closed form, and never below what a simulation reaches."""

import pytest
from planning import EvenLatency, EvenPlatform, problem

from disagg.base.request import Role
from disagg.placement.bounds import lone_prefill_s, phase_bound, token_s
from disagg.placement.goodput_job import run_goodput_job
from disagg.placement.instance_choice import BatchLimits, InstanceChoice
from disagg.placement.phases import bound_choice, phase_job
from disagg.placement.shapes import BuiltChoice, build_choice

USUAL = BatchLimits(None, 2048, 64)


def built(role: Role, tensor: int = 1, pipeline: int = 1, batching: BatchLimits = USUAL) -> BuiltChoice:
    return build_choice(problem(), InstanceChoice(role, "gpu", tensor, pipeline, batching))


def test_a_lone_prompt_takes_its_tokens_time() -> None:
    assert lone_prefill_s(built(Role.PREFILL), 1000) == pytest.approx(0.1)
    assert lone_prefill_s(built(Role.PREFILL, tensor=2), 1000) == pytest.approx(0.05)


def test_chunks_of_a_prompt_follow_each_other_through_a_pipeline() -> None:
    """Two chunks of 512 in two stages: the second waits for the first in stage one alone."""
    two = built(Role.PREFILL, pipeline=2, batching=BatchLimits(None, 512, 64))
    assert lone_prefill_s(two, 1024) == pytest.approx(3 * 512e-4 / 2)


def test_a_pipeline_with_fewer_sequences_than_stages_is_no_slower_than_its_length() -> None:
    latency = EvenLatency(0, 10e-3, num_devices=2, num_stages=2)
    assert token_s(latency, 1, 100) == pytest.approx(10.5e-3)
    assert token_s(latency, 40, 100) == pytest.approx(20e-3)


def test_prefill_is_bounded_by_arithmetic() -> None:
    found = phase_bound(built(Role.PREFILL), problem().sample, problem().target)
    assert found.rate == pytest.approx(10.0, rel=0.01)


def test_decode_is_bounded_by_memory_where_that_is_less_than_the_batch() -> None:
    """20,000 tokens hold 19 sequences of 1,010; each is there for 19 steps of 19.5 ms."""
    found = phase_bound(built(Role.DECODE), problem().sample, problem().target)
    assert found.limited_by == "KV memory"
    assert found.rate == pytest.approx(19 / (19 * 19.5e-3), rel=0.01)


def test_decode_is_bounded_by_the_objective_where_memory_is_plenty() -> None:
    """22 ms a step leave room for 24 sequences, and 2% more."""
    found = phase_bound(built(Role.DECODE), problem().sample, problem(target="tpot=22ms").target)
    assert found.limited_by == "KV memory"
    roomy = problem(platforms={"gpu": EvenPlatform(tokens=100_000)}, target="tpot=22ms")
    choice = InstanceChoice(Role.DECODE, "gpu", 1, 1, USUAL)
    found = phase_bound(build_choice(roomy, choice), roomy.sample, roomy.target)
    assert found.limited_by == "decode steps"
    assert found.rate == pytest.approx(24 / (19 * 22e-3), rel=0.03)


def test_what_one_step_breaks_no_rate_keeps() -> None:
    sample = problem().sample
    assert phase_bound(built(Role.PREFILL), sample, problem(target="ttft=50ms").target).rate == 0
    found = phase_bound(built(Role.DECODE), sample, problem(target="tpot=5ms").target)
    assert (found.rate, found.limited_by) == (0.0, "a lone decode step takes 10.5 ms")


@pytest.mark.parametrize("role", list(Role))
def test_simulations_stay_near_and_below_the_bound(role: Role) -> None:
    one = problem()
    phase = bound_choice(one, built(role))
    reached = run_goodput_job(phase_job(one, phase)).rate
    assert 0.3 * phase.bound.rate < reached <= phase.bound.rate
