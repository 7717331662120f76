"""``disagg profile``: a real instance, neighbour and server with a tiny model, and a profile that can be simulated."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from disagg.base.config import InstanceSettings
from disagg.base.errors import ProtocolError
from disagg.base.messages import InstanceFacts
from disagg.calibration.host_costs import HostMeasurement, LoneRequest, host_costs
from disagg.calibration.served_requests import ServedPull
from disagg.calibration.steps.campaign import Campaign, Measurement, MemoryReading, PartBeside
from disagg.calibration.steps.script import MeasuredStep
from disagg.cli import profile as command
from disagg.cli.main import main
from disagg.cli.profile import serve_arguments, to_profile, warn_if_busy
from disagg.costs.contention import Activity
from disagg.costs.memory import MemorySample
from disagg.costs.platform import HostCosts
from disagg.costs.profile import load_profile

SETTINGS = {"instance": "a", "role": "colocated", "control_endpoint": "", "model": {}, "cache": {}, "scheduler": {}}


def test_profile_then_simulate(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_QUICK_ALONE_S", 0.0)
    monkeypatch.setattr(command, "_QUICK_BESIDE_S", 0.0)
    path = tmp_path / "tiny.json"
    flags = ["--quick", "--dtype", "float32", "--kv-memory", "8MiB", "--max-batch-size", "8", "--threads", "1"]
    ran = CliRunner().invoke(main, ["profile", str(tiny_model("llama")), *flags, "--json", "-o", str(path)])
    assert ran.exit_code == 0, ran.output
    summary = json.loads(ran.stdout)
    assert summary["file"] == str(path)
    assert summary["held_out"]["num_samples"] > 2
    assert 0 <= summary["held_out"]["median"] <= summary["held_out"]["p90"] <= summary["held_out"]["maximum"]
    assert len(summary["worst"]) > 2
    assert summary["link_bytes_per_s"] > 0
    assert summary["message_s"] > 0
    if len(os.sched_getaffinity(0)) > 1:  # else there is no neighbour
        least, mean, most = summary["memory"]["together"]
        assert 0 < least <= mean <= most

    profile = load_profile(path)
    assert (profile.dtype, profile.num_threads) == ("float32", 1)
    lengths = [request.prompt_len for request in profile.served_requests]
    assert (len(lengths), 15 < lengths[0] < 30 < lengths[1]) == (2, True)
    assert profile.kv_bytes_per_token == 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, width, bytes
    simulation = ["simulate", "--latency", str(path), "--prompt-len", "100", "--output-len", "10", "--rate", "5"]
    simulated = CliRunner().invoke(main, [*simulation, "--requests", "20", "--json"], catch_exceptions=False)
    (run,) = json.loads(simulated.stdout)["runs"]
    assert run["num_finished"] == 20


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
    # Whole blocks of 16 tokens are pulled, 100 bytes a token.
    pulls = tuple(ServedPull(size - 3, 0.001 + size * 100 / 1e9) for size in (16, 1600, 16_000))
    measured = Measurement(facts=facts, alone=alone, beside={"decode": near})
    host = HostMeasurement(HostCosts(0.001, 0.002, 0.003), pulls=pulls)
    profile = to_profile(campaign, measured, host, "tiny")
    assert profile.kv_bytes_per_token == 100
    assert (profile.accept_s, profile.message_s, profile.deliver_s) == (0.001, 0.002, 0.003)
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
    assert profile.memory == (MemorySample(alone=4e10, together=3e10), MemorySample(alone=3e10, together=6e10)) * 2


def test_host_costs_are_what_is_neither_step_nor_pull() -> None:
    stages = {"queue_prefill": 0.003, "prefill": 0.05, "hand_over_wait": 0.002, "hand_over": 0.001}
    costs = host_costs([LoneRequest(0.057, told) for told in (stages, {}, stages)])
    assert costs == pytest.approx(HostCosts(accept_s=0.002, message_s=0.001, deliver_s=0.004))
    with pytest.raises(ProtocolError, match="no request"):
        host_costs([LoneRequest(0.057, {})])


def test_the_server_gets_the_flags_of_the_profile() -> None:
    values = {"kv_memory_bytes": 123, "prefix_caching": False, "cpus": (0, 2), "threads": None, "seed": 3}
    assert serve_arguments(values) == ["--kv-memory", "123", "--no-prefix-caching", "--cpus", "0,2"]


@pytest.mark.parametrize(
    ("file", "flags", "words"),
    [("absent/p.json", [], "cannot write the profile"), ("p.json", ["--cpus", "999"], "names core 999")],
)
def test_bad_input_is_refused_before_anything_is_measured(
    file: str, flags: list[str], words: str, tmp_path: Path
) -> None:
    ran = CliRunner().invoke(main, ["profile", "-o", str(tmp_path / file), *flags])
    assert ran.exit_code == 2
    assert words in ran.output


def test_a_busy_machine_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    calm = tuple(MeasuredStep(chunks=((0, 9),), time_s=0.01, on_core=0.99) for _ in range(10))
    warn_if_busy(calm)
    assert capsys.readouterr().err == ""
    warn_if_busy((*calm[:4], *(MeasuredStep(chunks=((0, 9),), time_s=0.01, on_core=0.6) for _ in range(6))))
    assert "40% of the time" in capsys.readouterr().err
