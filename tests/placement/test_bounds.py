"""Bounds: by hand in closed form, and never below what a simulation reaches."""

import pytest
from planning import EvenLatency, problem

from disagg.base.request import Role
from disagg.placement.bounds import lone_prefill_s, phase_bound, token_s
from disagg.placement.goodput_job import run_goodput_job
from disagg.placement.instance_choice import Batching, InstanceChoice
from disagg.placement.phases import bound_choice, phase_job
from disagg.placement.shapes import BuiltChoice, build_choice

USUAL = Batching(None, 2048, 64)


def built(role: Role, tensor: int = 1, pipeline: int = 1, batching: Batching = USUAL) -> BuiltChoice:
    return build_choice(problem(), InstanceChoice(role, "gpu", tensor, pipeline, batching))


def test_a_lone_prompt_takes_its_tokens_time() -> None:
    assert lone_prefill_s(built(Role.PREFILL), 1000) == pytest.approx(0.1)
    assert lone_prefill_s(built(Role.PREFILL, tensor=4), 1000) == pytest.approx(0.025)


def test_chunks_of_a_prompt_follow_each_other_through_a_pipeline() -> None:
    """Two chunks of 512 in two stages: the second waits for the first in stage one alone."""
    two = built(Role.PREFILL, pipeline=2, batching=Batching(None, 512, 64))
    assert lone_prefill_s(two, 1024) == pytest.approx(3 * 512e-4 / 4)


def test_a_pipeline_with_fewer_sequences_than_stages_is_no_slower_than_its_length() -> None:
    latency = EvenLatency(0, 10e-3, num_devices=2, num_stages=2)
    assert token_s(latency, 1, 100) == pytest.approx(10e-3)
    assert token_s(latency, 64, 100) == pytest.approx(10e-3)


def test_prefill_is_bounded_by_arithmetic() -> None:
    found = phase_bound(built(Role.PREFILL), problem().sample, problem().target)
    assert found.rate == pytest.approx(10.0, rel=0.01)


def test_decode_is_bounded_by_memory_where_that_is_less_than_the_batch() -> None:
    """20,000 tokens hold 19.5 sequences of 1,025; each is there for 49 steps of 10 ms."""
    found = phase_bound(built(Role.DECODE), problem().sample, problem().target)
    assert found.limited_by == "KV memory"
    assert found.rate == pytest.approx(19 / 0.49, rel=0.01)


def test_what_one_step_breaks_no_rate_keeps() -> None:
    sample = problem().sample
    assert phase_bound(built(Role.PREFILL), sample, problem(target="ttft=50ms").target).rate == 0
    found = phase_bound(built(Role.DECODE), sample, problem(target="tpot=5ms").target)
    assert (found.rate, found.limited_by) == (0.0, "a lone decode step takes 10.0 ms")


@pytest.mark.parametrize("role", list(Role))
def test_no_simulation_exceeds_the_bound(role: Role) -> None:
    one = problem()
    phase = bound_choice(one, built(role))
    reached = run_goodput_job(phase_job(one, phase)).rate
    assert 0.3 * phase.bound.rate < reached < 1.05 * phase.bound.rate
