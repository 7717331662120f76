"""What serving costs is found in the steps of a server that streams."""

import msgspec
import pytest
from simulated import LinearLatency

from disagg.simulator.contention import Activity, ServingCost
from disagg.simulator.measured_steps import FittedInterference, shape_of
from disagg.simulator.served_steps import ServedSample, fit_serving

INTERFERENCE = FittedInterference({Activity.DECODE: (0.0002, 0.0, 1e-8), Activity.PREFILL: (0.0001, 0.0, 0.0)})
TRUE = ServingCost(step_s=0.0007, token_s=0.00009, num_cores=2)


def served(num_streams: int) -> list[ServedSample]:
    """A decode and a prefill instance that work beside each other, with times that the true cost explains."""
    decode, prefill = tuple((200 + index, 1) for index in range(num_streams)), ((0, 256),)
    decode_s, prefill_s = 0.002, 0.02
    for _ in range(50):
        decode_s = expected_s(decode, Activity.PREFILL, 1, prefill_s)
        prefill_s = expected_s(prefill, Activity.DECODE, num_streams, decode_s)
    return [
        ServedSample(
            chunks=decode, time_s=decode_s, neighbour=Activity.PREFILL, neighbour_tokens=1, neighbour_step_s=prefill_s
        ),
        ServedSample(
            chunks=prefill,
            time_s=prefill_s,
            neighbour=Activity.DECODE,
            neighbour_tokens=num_streams,
            neighbour_step_s=decode_s,
        ),
    ]


def expected_s(
    chunks: tuple[tuple[int, int], ...], neighbour: Activity, neighbour_tokens: int, neighbour_step_s: float
) -> float:
    shape = shape_of(chunks)
    own_s = LinearLatency().stage_times_s(shape)[0] + INTERFERENCE.added_s(neighbour, shape)
    taken = TRUE.work_s(neighbour_tokens) / neighbour_step_s / 2
    return (own_s + TRUE.work_s(shape.num_samples) / 2) / (1 - taken)


SAMPLES = [sample for num_streams in (1, 4, 16) for sample in served(num_streams)]


def test_the_fit_finds_what_a_step_and_a_token_cost() -> None:
    found = fit_serving(SAMPLES, LinearLatency(), INTERFERENCE, num_cores=2, cores_per_instance=1)
    assert found is not None
    assert (found.step_s, found.token_s) == pytest.approx((TRUE.step_s, TRUE.token_s), rel=1e-6)
    assert (found.num_cores, found.cores_per_instance) == (2, 1)


def test_serving_that_costs_nothing_is_not_negative() -> None:
    quick = [msgspec.structs.replace(sample, time_s=sample.time_s / 2) for sample in SAMPLES]
    found = fit_serving(quick, LinearLatency(), INTERFERENCE, num_cores=2, cores_per_instance=1)
    assert found == ServingCost(0.0, 0.0, 2, 1)


@pytest.mark.parametrize(("num_samples", "num_cores"), [(0, 2), (6, 3)])
def test_nothing_is_said_of_what_was_not_measured_or_had_a_core_of_its_own(num_samples: int, num_cores: int) -> None:
    assert fit_serving(SAMPLES[:num_samples], LinearLatency(), INTERFERENCE, num_cores, 1) is None
