"""``disagg profile``: a real instance, neighbour and server with a tiny model, and a profile that can be simulated."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from disagg.calibration import profiling
from disagg.cli.main import main
from disagg.cli.profile import serve_arguments
from disagg.costs.profile import load_profile


def test_profile_then_simulate(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiling, "_QUICK_ALONE_S", 0.0)
    monkeypatch.setattr(profiling, "_QUICK_BESIDE_S", 0.0)
    path = tmp_path / "tiny.json"
    flags = ["--quick", "--dtype", "float32", "--kv-memory", "8MiB", "--max-batch-size", "8", "--threads", "1,2"]
    ran = CliRunner().invoke(main, ["profile", str(tiny_model("llama")), *flags, "--json", "-o", str(path)])
    assert ran.exit_code == 0, ran.output
    summary = json.loads(ran.stdout)
    assert summary["file"] == str(path)
    one, two = summary["by_threads"]
    assert (one["num_threads"], two["num_threads"]) == (1, 2)
    for held_out in (one["held_out"], two["held_out"]):
        assert held_out["num_samples"] > 2
        assert 0 <= held_out["median"] <= held_out["p90"] <= held_out["maximum"]
    assert len(one["worst"]) > 2
    assert summary["link_bytes_per_s"] > 0
    assert summary["message_s"] > 0
    assert summary["digest_bytes_per_s"] is None or summary["digest_bytes_per_s"] > 0
    if len(os.sched_getaffinity(0)) > 1:  # else there is no neighbour
        least, mean, most = one["memory"]["together"]
        assert 0 < least <= mean <= most

    profile = load_profile(path)
    assert (profile.dtype, profile.threads) == ("float32", (1, 2))
    lengths = [request.prompt_len for request in profile.served_requests]
    assert (len(lengths), 15 < lengths[0] < 30 < lengths[1]) == (2, True)
    assert profile.kv_bytes_per_token == 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, width, bytes
    simulation = ["simulate", "--latency", str(path), "--prompt-len", "100", "--output-len", "10", "--rate", "5"]
    simulated = CliRunner().invoke(main, [*simulation, "--requests", "20", "--json"], catch_exceptions=False)
    (run,) = json.loads(simulated.stdout)["runs"]
    assert run["num_finished"] == 20


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_profile_as_ctrl_c_does(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the server which it measures ends with it."""
    monkeypatch.setattr(profiling, "make_profile", lambda *_, **__: signal.raise_signal(number))
    ran = CliRunner().invoke(main, ["profile", "-o", str(tmp_path / "p.json")])
    assert ran.exit_code != 0
    assert not (tmp_path / "p.json").exists()


def test_the_server_gets_the_flags_of_the_profile() -> None:
    values = {"kv_memory_bytes": 123, "prefix_caching": False, "cpus": (0, 2), "threads": None, "seed": 3}
    assert serve_arguments(values) == ["--kv-memory", "123", "--no-prefix-caching", "--cpus", "0,2"]


@pytest.mark.parametrize(
    ("file", "flags", "words"),
    [
        ("absent/p.json", [], "cannot write the profile"),
        ("p.json", ["--cpus", "999"], "names core 999"),
        ("p.json", ["--threads", "0,1"], "on one thread at least"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(
    file: str, flags: list[str], words: str, tmp_path: Path
) -> None:
    ran = CliRunner().invoke(main, ["profile", "-o", str(tmp_path / file), *flags])
    assert ran.exit_code == 2
    assert words in ran.output
