"""What serving costs is read off CPU clocks, and split into steps, tokens, requests and tokens of their prompts."""

import pytest

from disagg.costs.contention import ServingCost
from disagg.costs.serving_fit import ServedRequest, ServedSample, fit_serving

TRUE = ServingCost(step_s=0.0007, token_s=0.00009, num_cores=2, request_s=0.003, prompt_token_s=4e-6)
SAMPLES = [ServedSample(num_streams=size, cpu_s=TRUE.work_s(size)) for size in (1, 4, 16)]


def test_the_fit_finds_what_a_step_and_a_token_cost() -> None:
    found = fit_serving(SAMPLES, (), num_cores=2)
    assert found is not None
    assert (found.step_s, found.token_s) == pytest.approx((TRUE.step_s, TRUE.token_s), rel=1e-6)
    assert found.num_cores == 2


def test_of_a_request_its_tokens_are_accounted_for_already() -> None:
    requests = [
        ServedRequest(prompt_len=length, num_tokens=2, cpu_s=TRUE.request_work_s(length) + 2 * TRUE.work_s(1))
        for length in (24, 500, 2000)
    ]
    found = fit_serving(SAMPLES, requests, num_cores=2)
    assert found is not None
    assert (found.request_s, found.prompt_token_s) == pytest.approx((TRUE.request_s, TRUE.prompt_token_s), rel=1e-6)
    cheap = [ServedRequest(prompt_len=24, num_tokens=2, cpu_s=TRUE.work_s(1))]
    nothing = fit_serving(SAMPLES, cheap, num_cores=2)
    assert nothing is not None
    assert (nothing.request_s, nothing.prompt_token_s) == (0.0, 0.0)


def test_neither_part_is_negative() -> None:
    """A token that seems to save time costs nothing."""
    falling = [ServedSample(num_streams=size, cpu_s=0.001 / size) for size in (1, 4)]
    found = fit_serving(falling, (), num_cores=2)
    assert found is not None
    assert found.token_s == 0.0 < found.step_s


def test_no_time_is_no_cost() -> None:
    free = [ServedSample(num_streams=size, cpu_s=0.0) for size in (1, 4)]
    assert fit_serving(free, (), num_cores=2) == ServingCost(0.0, 0.0, 2)


def test_nothing_is_said_of_what_was_not_measured() -> None:
    assert fit_serving((), (), num_cores=2) is None
