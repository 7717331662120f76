"""Profiles: the fit finds what made the samples, and says how wrong it is."""

import json
import random
from pathlib import Path

import msgspec
import numpy as np
import pytest

from disagg.base.errors import ConfigurationError
from disagg.costs.contention import Activity
from disagg.costs.fit import fit_relative
from disagg.costs.latency import StepShape
from disagg.costs.links import fit_link, fit_offers
from disagg.costs.measured_steps import StepSample, fit_interference, fit_latency, hold_out, interference_errors
from disagg.costs.memory import MemorySample, Scarcity
from disagg.costs.platform import HostCosts
from disagg.costs.profile import ParallelSamples, Profile, load_profile, save_profile
from disagg.costs.profiled_platform import ProfiledPlatform


def true_time_s(shape: StepShape) -> float:
    """A machine whose matrix products wait for weights up to 64 tokens and for arithmetic beyond."""
    linear = 0.008 + 1e-4 * max(0, shape.num_tokens - 64)
    return linear + 4e-9 * shape.prefill_squares + 3e-7 * shape.decode_context + 2e-5 * shape.num_samples


def samples(noise: float = 0.0, count: int = 200, seed: int = 0) -> tuple[StepSample, ...]:
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        decodes = [(rng.randint(1, 2000), 1) for _ in range(rng.choice((0, 1, 2, 5, 16, 40)))]
        prefills = [(rng.choice((0, 0, 512)), rng.choice((16, 100, 256, 512))) for _ in range(rng.choice((0, 0, 1)))]
        chunks = tuple(prefills + decodes) or ((0, 128),)
        shape = StepSample(chunks=chunks, time_s=1.0).shape()
        made.append(StepSample(chunks=chunks, time_s=true_time_s(shape) * rng.gauss(1, noise)))
    return tuple(made)


def profile(**changes: object) -> Profile:
    steps = ParallelSamples(tensor_parallel=1, samples=samples())
    return msgspec.structs.replace(
        Profile(
            model="m",
            device="this",
            dtype="bfloat16",
            kv_bytes_per_token=1000,
            steps=(steps,),
            link_bytes_per_s=1e9,
            link_latency_s=0.001,
        ),
        **changes,
    )


def test_a_fit_without_noise_is_exact_also_where_nothing_was_measured() -> None:
    latency, error = fit_latency(samples())
    assert error.maximum < 1e-6
    for sample in samples(seed=9, count=50):
        assert latency.stage_times_s(sample.shape())[0] == pytest.approx(true_time_s(sample.shape()), rel=1e-6)
    long = StepShape(num_prefills=1, num_prefill_tokens=2000, prefill_squares=2000**2, num_samples=1)
    assert latency.stage_times_s(long)[0] == pytest.approx(true_time_s(long), rel=1e-6)


def test_the_reported_error_is_that_of_held_out_samples() -> None:
    _, error = fit_latency(samples(noise=0.05))
    assert error.num_samples == 40
    assert 0.01 < error.median < 0.06
    assert error.median <= error.p90 <= error.maximum
    assert str(error).startswith("median ")


def beside(activity: Activity, step_s: float, token_s: float, context_s: float) -> list[StepSample]:
    """Samples of the true machine with a neighbour that adds these."""
    made = []
    for sample in samples(seed=5, count=30):
        shape = sample.shape()
        time_s = sample.time_s + step_s + token_s * shape.num_tokens + context_s * shape.decode_context
        made.append(StepSample(chunks=sample.chunks, time_s=time_s, neighbour=activity))
    return made


def test_what_a_neighbour_adds_is_found() -> None:
    disturbed = [*beside(Activity.DECODE, 0.004, 0.0, 8e-8), *beside(Activity.PREFILL, 0.0, 1e-5, 0.0)]
    latency, error = fit_latency([*samples(), *disturbed])
    assert error.maximum < 1e-6  # neighbours do not change what an instance alone takes
    found = fit_interference(disturbed, latency).coefficients
    assert found[Activity.DECODE] == pytest.approx((0.004, 0.0, 8e-8), abs=1e-9)
    assert found[Activity.PREFILL] == pytest.approx((0.0, 1e-5, 0.0), abs=1e-9)


def test_a_neighbour_that_was_hardly_measured_adds_nothing() -> None:
    latency, _ = fit_latency(samples())
    assert fit_interference(beside(Activity.DECODE, 0.004, 0.0, 0.0)[:4], latency).coefficients == {}


def test_held_out_samples_come_with_their_predictions() -> None:
    odd_one = StepSample(chunks=((100, 1),), time_s=true_time_s(StepSample(chunks=((100, 1),), time_s=1).shape()) * 2)
    held_out = hold_out([*samples(count=199), odd_one])
    worst = max(held_out, key=lambda one: abs(one.relative_error))
    assert worst.sample is odd_one
    assert worst.relative_error == pytest.approx(-0.5)


def test_a_link_is_found_in_transfers() -> None:
    link = fit_link([(size, 0.0003 + size / 2e10) for size in (10**5, 10**6, 10**7, 10**8)])
    assert link.latency_s == pytest.approx(0.0003)
    assert link.bytes_per_s == pytest.approx(2e10)
    alike = fit_link([(10**6, 0.001), (10**6, 0.001)])
    assert alike.transfer_time_s(10**6) == pytest.approx(0.001)


def test_messages_and_digests_are_found_in_offers() -> None:
    costs = fit_offers([(size, 0.002 + size / 1e10) for size in (10**5, 10**7, 10**8)])
    assert costs == pytest.approx((0.001, 1e10))
    assert fit_offers([(10**5, 0.002), (10**8, 0.002)]) == (pytest.approx(0.001), None)
    assert fit_offers([(10**5, 0.003), (10**8, 0.002)]).digest_bytes_per_s is None


def test_no_coefficient_is_negative() -> None:
    latency, _ = fit_latency(samples(noise=0.3, seed=4))
    assert min(latency.coefficients) >= 0
    # Times that fall with the only feature: plain least squares would need a negative slope.
    features = np.array([[1.0, x] for x in (1.0, 2.0, 3.0, 4.0)])
    assert fit_relative(features, np.array([4.0, 3.0, 2.0, 1.0]))[1] == 0


def test_a_profile_survives_the_file(tmp_path: Path) -> None:
    save_profile(profile(), tmp_path / "p.json")
    assert load_profile(tmp_path / "p.json") == profile()


def test_a_profile_of_one_number_of_threads_is_still_read(tmp_path: Path) -> None:
    """Version 3 said once for all its steps on how many threads they ran, and what memory gave."""
    reading = {"alone": 4e10, "together": 5e10}
    saved = json.loads(msgspec.json.encode(profile()))
    (steps,) = saved["steps"]
    old = saved | {"version": 3, "num_threads": 2, "memory": [reading]}
    old["steps"] = [{"tensor_parallel": 1, "samples": steps["samples"]}]
    (tmp_path / "p.json").write_text(json.dumps(old))
    read = load_profile(tmp_path / "p.json")
    assert (read.version, read.threads) == (4, (2,))
    assert read.steps[0].samples == samples()
    assert read.steps[0].memory == (MemorySample(**reading),)


def test_a_platform_is_what_the_profile_measured() -> None:
    platform = ProfiledPlatform(profile(), kv_memory_bytes=10_000_000)
    assert platform.kv_bytes_per_token == 1000
    assert platform.capacity_tokens(1, 2) == 20_000
    assert platform.host == HostCosts()
    assert platform.link.transfer_time_s(10**9) == pytest.approx(1.001)
    shape = StepShape(num_decodes=4, decode_context=4000, num_samples=4)
    whole, halves = platform.latency(1, 1).stage_times_s(shape), platform.latency(1, 2).stage_times_s(shape)
    assert sum(halves) == pytest.approx(whole[0])
    with pytest.raises(ConfigurationError, match="no steps at tensor parallelism 2, only at 1"):
        platform.latency(2, 1)


def test_a_decoding_neighbour_costs_as_much_as_memory_is_scarce() -> None:
    """A byte takes 1/40 ns alone, and 2/50 where two instances read 50 GB/s together; at 80 it takes no more."""
    scarce, calm = MemorySample(alone=40e9, together=50e9), MemorySample(alone=40e9, together=80e9)
    noisy = list(samples())
    for reading, added in ((scarce, (0.005, 4e-6, 8e-8)), (calm, (0.001, 0.0, 0.0))):
        noisy += [
            msgspec.structs.replace(sample, memory_bytes_per_s=reading.together)
            for sample in beside(Activity.DECODE, *added)
        ]
    readings = (scarce, calm, calm, calm)
    measured = profile(steps=(ParallelSamples(tensor_parallel=1, samples=tuple(noisy), memory=readings),))

    def cost(*memory_bytes_per_s: float) -> tuple[float, float, float]:
        platform = ProfiledPlatform(measured, 1, memory_bytes_per_s)
        assert platform.interference is not None
        return platform.interference.coefficients[Activity.DECODE]

    # The profile met 50 GB/s in a quarter of its readings.
    assert cost() == pytest.approx((0.002, 1e-6, 2e-8), rel=1e-3)
    assert cost(50e9) == pytest.approx((0.005, 4e-6, 8e-8), rel=1e-3)
    assert cost(80e9) == pytest.approx((0.001, 0.0, 0.0), abs=1e-9)
    assert cost(50e9, 80e9) == pytest.approx((0.003, 2e-6, 4e-8), rel=1e-3)


def test_errors_beside_neighbours_are_those_at_each_samples_own_scarcity() -> None:
    disturbed = [
        msgspec.structs.replace(sample, memory_bytes_per_s=together)
        for together, added_s in ((50e9, 0.005), (80e9, 0.0))
        for sample in beside(Activity.DECODE, added_s, 0.0, 0.0)
    ]
    latency, _ = fit_latency(samples())
    readings = [MemorySample(alone=40e9, together=together) for together in (50e9, 80e9)]
    told = interference_errors([*samples(), *disturbed], latency, Scarcity.of(readings))
    assert told.keys() == {Activity.DECODE}
    assert told[Activity.DECODE].maximum < 1e-3
    assert interference_errors([*samples(), *disturbed], latency)[Activity.DECODE].mean > 0.05


def test_without_readings_a_neighbour_costs_what_it_did_in_the_mean() -> None:
    noisy = (*samples(), *beside(Activity.DECODE, 0.004, 0.0, 8e-8))
    measured = profile(steps=(ParallelSamples(tensor_parallel=1, samples=noisy),))
    for readings in ((), (50e9,)):
        platform = ProfiledPlatform(measured, 1, readings)
        assert platform.interference is not None
        assert platform.interference.coefficients[Activity.DECODE] == pytest.approx((0.004, 0.0, 8e-8), abs=1e-9)


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "is no profile"), ('{"model": "m"}', "is no profile"), (None, "cannot read")],
)
def test_something_else_is_refused(text: str | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigurationError, match=words):
        load_profile(path)


def test_another_version_is_refused(tmp_path: Path) -> None:
    save_profile(profile(version=99), tmp_path / "p.json")
    with pytest.raises(ConfigurationError, match="version 99"):
        load_profile(tmp_path / "p.json")


def test_too_few_samples_are_no_profile(tmp_path: Path) -> None:
    few = ParallelSamples(tensor_parallel=1, samples=samples(count=3))
    save_profile(profile(steps=(few,)), tmp_path / "p.json")
    with pytest.raises(ConfigurationError, match="is no profile"):
        load_profile(tmp_path / "p.json")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"version": 3, "steps": 7}, r"steps"),
        ({"version": 3, "steps": [7]}, r"steps\[0\]"),
        ({"link_bytes_per_s": 1e-300}, r"link_bytes_per_s"),
        ({"link_bytes_per_s": -1}, r"link_bytes_per_s"),
        ({"link_latency_s": 1e300}, r"link_latency_s"),
        ({"accept_s": -0.1}, r"accept_s"),
        ({"kv_bytes_per_token": 10**30}, r"kv_bytes_per_token"),
        ({"kv_bytes_per_tokn": 1}, r"did you mean kv_bytes_per_token\?"),
        ({"served": [{"num_streams": 1, "cpu_s": -1}]}, r"served\[0\].cpu_s"),
        ({"served_requests": [{"prompt_len": 0, "num_tokens": 1, "cpu_s": 1}]}, r"served_requests\[0\].prompt_len"),
    ],
)
def test_a_number_that_cannot_be_is_named_by_its_place(fields: dict[str, object], words: str, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    save_profile(profile(), path)
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ConfigurationError, match=rf"is no profile: .*{words}"):
        load_profile(path)


@pytest.mark.parametrize("sample", [{"time_s": 0}, {"time_s": 1e300}, {"chunks": [[-1, 1]]}, {"chunks": [[0, 10**12]]}])
def test_a_step_that_cannot_be_is_named_by_its_place(sample: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    save_profile(profile(), path)
    saved = json.loads(path.read_text())
    saved["steps"][0]["samples"][3] |= sample
    path.write_text(json.dumps(saved))
    with pytest.raises(ConfigurationError, match=r"steps\[0\].samples\[3\]"):
        load_profile(path)
