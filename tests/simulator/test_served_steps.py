"""What serving costs is read off CPU clocks, and split into so much a step and so much a token."""

import pytest

from disagg.simulator.contention import ServingCost
from disagg.simulator.served_steps import ServedSample, fit_serving

TRUE = ServingCost(step_s=0.0007, token_s=0.00009, num_cores=2)
SAMPLES = [ServedSample(num_streams=size, step_s=0.01, cpu_s=TRUE.work_s(size)) for size in (1, 4, 16)]


def test_the_fit_finds_what_a_step_and_a_token_cost() -> None:
    found = fit_serving(SAMPLES, num_cores=2, cores_per_instance=1)
    assert found is not None
    assert (found.step_s, found.token_s) == pytest.approx((TRUE.step_s, TRUE.token_s), rel=1e-6)
    assert (found.num_cores, found.cores_per_instance) == (2, 1)


def test_neither_part_is_negative() -> None:
    """A token that seems to save time costs nothing."""
    falling = [ServedSample(num_streams=size, step_s=0.01, cpu_s=0.001 / size) for size in (1, 4)]
    found = fit_serving(falling, num_cores=2, cores_per_instance=1)
    assert found is not None
    assert found.token_s == 0.0 < found.step_s


def test_no_time_is_no_cost() -> None:
    free = [ServedSample(num_streams=size, step_s=0.01, cpu_s=0.0) for size in (1, 4)]
    assert fit_serving(free, num_cores=2, cores_per_instance=1) == ServingCost(0.0, 0.0, 2, 1)


@pytest.mark.parametrize(("num_samples", "num_cores"), [(0, 2), (3, 3)])
def test_nothing_is_said_of_what_was_not_measured_or_had_a_core_of_its_own(num_samples: int, num_cores: int) -> None:
    assert fit_serving(SAMPLES[:num_samples], num_cores, cores_per_instance=1) is None
