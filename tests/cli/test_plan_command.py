"""``disagg plan``: from files and flags to a placement, and every bad input to a sentence."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from disagg.cli.plan import plan
from disagg.cli.simulate import simulate

QUICK = ["--requests", 30, "--seeds", 1, "--workers", 1, "--prompt-len", 2000, "--output-len", 20]
NODE = "{name: gpu, device: a100-sxm, devices: 2}"
PRICED = "devices: {a100-sxm: {price_per_hour: 2.0}}"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "seven" / "config.json"
    path.parent.mkdir()
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    rest = {"vocab_size": 32000, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "hidden_act": "silu"}
    path.write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama", **shape, **rest}))
    return path


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(f"nodes: [{NODE}]\n{PRICED}\n")
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(plan, [str(argument) for argument in arguments])


def report(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed


def test_a_plan_is_written_and_simulated(model: Path, cluster: Path, tmp_path: Path) -> None:
    """The placement of the plan, at its goodput, keeps the objectives in ``disagg simulate`` too."""
    written = tmp_path / "placement.yaml"
    found = report("--model", model, "--cluster", cluster, *QUICK, "-o", written)
    best = found["placements"][0]
    assert best["goodput_per_device"]["mean"] == pytest.approx(best["goodput"]["mean"] / best["num_devices"])
    assert best["goodput_per_dollar"] == pytest.approx(best["goodput"]["mean"] / (2.0 * best["num_devices"]))
    flags = ["--cluster", cluster, "--model", model, "--placement", written, *QUICK[:2], *QUICK[6:]]
    rate = 0.8 * best["goodput"]["mean"]
    simulated = CliRunner().invoke(simulate, [str(flag) for flag in (*flags, "--rate", rate, "--json")])
    assert simulated.exit_code == 0, simulated.output
    assert json.loads(simulated.stdout)["attainment"]["mean"] >= 0.9


def test_a_plan_for_people(model: Path) -> None:
    flags = ["--model", model, "--latency", "a100-sxm", "--devices", 1, *QUICK]
    result = run(*flags, "--slo", "ttft=500ms,tpot=50ms@95%,ttft.p99<=2s")
    assert result.exit_code == 0, result.output
    for words in ("seven on a100-sxm, roofline", "tpot=50ms@95%", "the first", "held back by", "runs simulated"):
        assert words in result.stdout.replace("\n", " ")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--latency", "a100-sxm"], "Give --cluster FILE, or --devices N"),
        (["--latency", "a100-sxm", "--devices", 2, "--slo", "tpot=1ms"], "a lone decode step takes"),
        (["--latency", "l40s", "--devices", 2, "--max-nodes", 0], "max-nodes"),
        (["--latency", "a100-sxm", "--devices", 2, "--sessions", "x"], "not --sessions"),
        (["--latency", "a100-sxm", "--devices", 2, "--per", "dollar"], "costs in dollars is not known"),
        (["--latency", "a100-sxm", "--devices", 2, "--slo", "ttft=1s@0%"], "above 0%"),
        (["--latency", "a100-sxm", "--devices", 2, "--as", "k8s"], "take --as k8s-vllm"),
        (["--latency", "a100-sxm", "--devices", 2, "--no-lend-cores"], "are for the cores of one host"),
    ],
)
def test_bad_input_is_told(model: Path, flags: list[object], words: str) -> None:
    result = run("--model", model, *QUICK, *flags)
    assert result.exit_code != 0
    assert words in f"{result.output} {result.exception}"


def test_a_profiles_plan_is_not_for_vllm(tmp_path: Path) -> None:
    result = run("--latency", tmp_path / "profile.json", "--as", "vllm", *QUICK)
    assert "take --as k8s" in str(result.exception)


def test_a_cluster_says_how_many_devices_there_are(model: Path, cluster: Path) -> None:
    assert "leave out --devices" in str(run("--model", model, "--cluster", cluster, "--devices", 2, *QUICK).exception)
