"""From what a campaign measured to a profile."""

import os

import msgspec
import pytest

from disagg.base.config import Device, InstanceGroup, InstanceSettings, Placement
from disagg.base.errors import ProtocolError
from disagg.base.messages import InstanceFacts
from disagg.base.request import Role
from disagg.bench.client.hand_over_times import HandOverTimes
from disagg.calibration.host_costs import HostMeasurement, LoneRequest, host_costs
from disagg.calibration.profiling import busy_warnings, deployments_of, to_profile
from disagg.calibration.steps.campaign import Campaign, Measurement, MemoryReading, PartBeside
from disagg.calibration.steps.script import MeasuredStep
from disagg.costs.contention import Activity
from disagg.costs.memory import MemorySample
from disagg.costs.platform import HostCosts
from disagg.measure.statistics import Percentiles
from disagg.serve.launch.deployment import Deployment

SETTINGS = {"instance": "a", "role": "colocated", "control_endpoint": "", "model": {}, "cache": {}, "scheduler": {}}


def hand_over(num_tokens: int, control_s: float, bytes_s: float) -> HandOverTimes:
    return HandOverTimes(
        num_hand_overs=1,
        num_tokens=num_tokens,
        control_s=Percentiles.of([control_s]),
        bytes_s=Percentiles.of([bytes_s]),
        gap_ratio=Percentiles.of([1.0]),
    )


def test_a_measurement_becomes_a_profile_in_random_order() -> None:
    facts = InstanceFacts(
        pid=1,
        device="cpu",
        kernel_backend="native",
        num_blocks=10,
        block_size=16,
        max_model_len=100,
        vocab_size=10,
        weight_bytes=0,
        kv_bytes=16_000,
        load_s=0.0,
        pool=b"",
    )
    campaign = Campaign(instance=msgspec.convert(SETTINGS, InstanceSettings), neighbour=None, temperature=0.5)
    alone = tuple(MeasuredStep(chunks=((0, 2 + number),), time_s=0.01 + number) for number in range(20))
    near = tuple(
        PartBeside(
            (MeasuredStep(chunks=((7, 1),), time_s=time_s),), (MemoryReading(4e10, 3e10), MemoryReading(3e10, 6e10))
        )
        for time_s in (0.02, 0.03)
    )
    # Whole blocks of 16 tokens are offered and pulled, 100 bytes a token.
    hand_overs = tuple(
        hand_over(size - 3, control_s=0.004 + size * 100 / 2e9, bytes_s=0.001 + size * 100 / 1e9)
        for size in (16, 1600, 16_000)
    )
    lone = LoneRequest(0.057, {"queue_prefill": 0.003, "prefill": 0.05})
    measured = Measurement(facts=facts, alone=alone, beside={"decode": near})
    host = HostMeasurement((lone,), hand_overs)
    profile = to_profile([(campaign, measured)], host, "tiny")
    assert profile.kv_bytes_per_token == 100
    assert (profile.accept_s, profile.message_s, profile.deliver_s) == pytest.approx((0.001, 0.002, 0.004))
    assert profile.digest_bytes_per_s == pytest.approx(2e9)
    assert profile.link_latency_s == pytest.approx(0.001)
    assert profile.link_bytes_per_s == pytest.approx(1e9)
    assert profile.temperature == 0.5
    samples = profile.steps[0].samples
    assert sorted(sample.time_s for sample in samples if sample.neighbour is None) == [step.time_s for step in alone]
    assert [sample.time_s for sample in samples if sample.neighbour is None] != [step.time_s for step in alone]
    beside = [sample for sample in samples if sample.neighbour is Activity.DECODE]
    assert sorted((sample.chunks, sample.time_s) for sample in beside) == [(((7, 1),), 0.02), (((7, 1),), 0.03)]
    # As much time for a byte as in the mean of the two readings.
    assert [sample.memory_bytes_per_s for sample in beside] == pytest.approx([4e10, 4e10])
    assert (
        profile.steps[0].memory
        == (MemorySample(alone=4e10, together=3e10), MemorySample(alone=3e10, together=6e10)) * 2
    )


def test_each_number_of_threads_is_measured_on_a_pair_of_its_own() -> None:
    num_cores = len(os.sched_getaffinity(0))
    pair = Deployment(
        placement=Placement(groups=tuple(InstanceGroup(role=role, count=1) for role in (Role.PREFILL, Role.DECODE)))
    )
    usual = [one.host.threads for one in deployments_of(pair, ())]
    assert usual == sorted({1, max(1, num_cores // 2), num_cores})
    assert [one.host.threads for one in deployments_of(pair, (2, 1))] == [1, 2]
    on_gpu = msgspec.structs.replace(pair, host=msgspec.structs.replace(pair.host, device=Device.CUDA))
    assert deployments_of(on_gpu, (1, 2)) == [on_gpu]


def test_host_costs_are_what_is_neither_step_nor_pull() -> None:
    stages = {"queue_prefill": 0.003, "prefill": 0.05}
    costs = host_costs([LoneRequest(0.057, told) for told in (stages, {}, stages)], message_s=0.001)
    assert costs == pytest.approx(HostCosts(accept_s=0.002, message_s=0.001, deliver_s=0.004))
    with pytest.raises(ProtocolError, match="no request"):
        host_costs([LoneRequest(0.057, {})], message_s=0.001)


def test_a_busy_machine_is_said() -> None:
    calm = tuple(MeasuredStep(chunks=((0, 9),), time_s=0.01, on_core=0.99) for _ in range(10))
    assert busy_warnings([calm]) == ()
    busy = (*calm[:4], *(MeasuredStep(chunks=((0, 9),), time_s=0.01, on_core=0.6) for _ in range(6)))
    (warning,) = busy_warnings([calm, busy])
    assert "40% of the time" in warning
