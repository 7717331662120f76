"""Step times on any number of threads: as measured where they were, else an estimate that is called one."""

import pytest

from disagg.costs.latency import StepShape
from disagg.costs.measured_steps import StepSample
from disagg.costs.memory import MemorySample
from disagg.costs.profile import ParallelSamples, Profile
from disagg.costs.profiled_platform import ProfiledPlatform
from disagg.costs.thread_scaling import estimate_words, latency_at, samples_near

DECODES = StepShape(num_decodes=4, decode_context=404, num_samples=4)


def steps_on(num_threads: int | None, token_s: float, together: float | None = None) -> ParallelSamples:
    """Steps that take ``token_s`` for each token; a core alone reads 10 GB/s from memory, two ``together``."""
    sizes = [1 + number % 7 for number in range(40)]
    samples = tuple(StepSample(chunks=((100, 1),) * size, time_s=token_s * size) for size in sizes)
    memory = () if together is None else (MemorySample(alone=10e9, together=together),)
    return ParallelSamples(tensor_parallel=1, num_threads=num_threads, samples=samples, memory=memory)


def profile(*steps: ParallelSamples) -> Profile:
    return Profile(
        model="m", device="d", dtype="bfloat16", kv_bytes_per_token=1000, steps=steps, link_bytes_per_s=1e9, num_cores=8
    )


def step_s(measured: Profile, num_threads: int | None) -> float:
    return latency_at(measured, num_threads).stage_times_s(DECODES)[0]


def test_measured_threads_have_their_own_step_times() -> None:
    measured = profile(steps_on(2, 0.007), steps_on(1, 0.01))
    assert measured.threads == (1, 2)
    assert step_s(measured, 1) == step_s(measured, None) == pytest.approx(0.04)
    assert step_s(measured, 2) == pytest.approx(0.028)
    assert estimate_words(measured, 2) is None


def test_between_measured_threads_each_doubling_gains_as_much() -> None:
    measured = profile(steps_on(1, 0.01), steps_on(4, 0.0049))
    assert step_s(measured, 2) == pytest.approx(0.04 * 0.7)
    assert estimate_words(measured, 2) == (
        "step times on 2 thread(s) are an estimate: the profile has those on 1, 4 (--threads)"
    )


@pytest.mark.parametrize(("together", "factor"), [(20e9, 0.5), (10e9, 1.0), (12.5e9, 0.8)])
def test_beyond_measured_threads_arithmetic_is_shared_but_memory_is_not(together: float, factor: float) -> None:
    """What two cores read together decides what two threads gain."""
    measured = profile(steps_on(1, 0.01, together))
    assert step_s(measured, 2) == pytest.approx(0.04 * factor / 0.95)


def test_fewer_threads_than_were_measured_take_longer() -> None:
    assert step_s(profile(steps_on(2, 0.01)), 1) == pytest.approx(0.04 * 2 * 0.95)


def test_a_device_has_no_threads() -> None:
    measured = profile(steps_on(None, 0.01))
    assert measured.threads == ()
    assert step_s(measured, 8) == pytest.approx(0.04)
    platform = ProfiledPlatform(measured, 1)
    assert (platform.num_threads, platform.at_threads(8)) == (None, platform)


def test_stages_share_out_an_estimate() -> None:
    measured = profile(steps_on(1, 0.01), steps_on(4, 0.0049))
    for num_threads in (1, 2, 8):
        halves = latency_at(measured, num_threads, pipeline_parallel=2)
        assert halves.num_stages == 2
        assert sum(halves.stage_times_s(DECODES)) == pytest.approx(step_s(measured, num_threads))


def test_a_platform_is_of_the_fewest_threads_until_others_are_asked_for() -> None:
    platform = ProfiledPlatform(profile(steps_on(1, 0.01), steps_on(4, 0.005)), 1)
    assert (platform.num_threads, platform.at_threads(None)) == (1, platform)
    wide = platform.at_threads(4)
    assert wide.num_threads == 4
    assert wide.latency(1, 1).stage_times_s(DECODES)[0] == pytest.approx(0.02)


def test_neighbours_cost_what_those_of_the_next_fewer_threads_do() -> None:
    one, four = steps_on(1, 0.01), steps_on(4, 0.005)
    measured = profile(one, four)
    assert [samples_near(measured, number) for number in (1, 2, 4, 8)] == [one, one, four, four]
    assert samples_near(profile(four), 1) is four
