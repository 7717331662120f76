"""``disagg simulate``: from files and flags to a report, and every bad input to a sentence."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from disagg.base.errors import ConfigurationError
from disagg.cli.simulate import simulate
from disagg.costs.measured_steps import StepSample
from disagg.costs.profile import ParallelSamples, Profile, save_profile
from disagg.measure.trace import Trace
from disagg.simulator.simulated_requests import simulated_requests

PUBLISHED = ["--engine", "distserve", "--model", "opt-13b"]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    rows = [f"{number * 0.3},{100 + 37 * number % 900},{5 + 7 * number % 60}" for number in range(40)]
    path.write_text("arrival_s,prompt_len,output_len\n" + "\n".join(rows))
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "seven" / "config.json"
    path.parent.mkdir()
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    rest = {"vocab_size": 32000, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "hidden_act": "silu"}
    path.write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama", **shape, **rest}))
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(simulate, [str(argument) for argument in arguments])


def report(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed


def test_a_report_for_people(trace: Path) -> None:
    result = run("--workload", trace, *PUBLISHED)
    assert result.exit_code == 0, result.output
    for words in ("40 requests at 3.33 requests/s", "TTFT", "P90", "attainment", "KV of decode-0", "2 device(s)"):
        assert words in result.stdout.replace("\n", " ")


def test_a_report_for_programs(trace: Path) -> None:
    found = report("--workload", trace, *PUBLISHED, "--slo", "ttft=0.5s,tpot=80ms", "--find-goodput")
    assert found["num_devices"] == 2
    assert found["slo"] == {"ttft_s": 0.5, "tpot_s": 0.08}
    assert found["attainment"]["mean"] == found["runs"][0]["attainment"]
    assert found["goodput_per_device"] == found["goodput"] / 2 > 0
    assert found["runs"][0]["num_finished"] == 40


def test_a_target_is_said_with_its_part_and_its_tails(trace: Path) -> None:
    slo = ("--slo", "ttft=0.5s,tpot=80ms@80%,ttft.p99<=1ms")
    found = report("--workload", trace, *PUBLISHED, *slo)
    assert found["attainment_target"] == 0.8
    assert [words.split()[0] for words in found["missed"]] == ["ttft.p99"]
    assert report("--workload", trace, *PUBLISHED, *slo, "--attainment", "0.7")["attainment_target"] == 0.7
    told = run("--workload", trace, *PUBLISHED, *slo).stdout
    assert "target  ttft=500ms,tpot=80ms@80%,ttft.p99<=1ms: missed, ttft.p99" in told


def test_equal_calls_print_equal_bytes(trace: Path) -> None:
    assert (
        run("--workload", trace, *PUBLISHED, "--json").stdout == run("--workload", trace, *PUBLISHED, "--json").stdout
    )


def test_a_placement_file_says_the_parallelism(trace: Path, tmp_path: Path) -> None:
    placement = tmp_path / "placement.yaml"
    placement.write_text(
        "groups:\n- {role: prefill, count: 1, tensor_parallel: 2}\n"
        "- {role: decode, count: 1, tensor_parallel: 1, pipeline_parallel: 2}\n"
    )
    found = report("--workload", trace, *PUBLISHED, "--placement", placement)
    assert found["num_devices"] == 4
    assert found["runs"][0]["ttft"]["p50"] < report("--workload", trace, *PUBLISHED)["runs"][0]["ttft"]["p50"]


def test_a_device_and_a_configuration_are_enough(trace: Path, model: Path) -> None:
    h200 = report("--workload", trace, "--latency", "h200-sxm", "--model", model)
    a100 = report("--workload", trace, "--latency", "a100-sxm", "--model", model, "--colocated", 2)
    assert h200["platform"] == "seven on h200-sxm, roofline"
    assert h200["runs"][0]["ttft"]["p50"] < a100["runs"][0]["ttft"]["p50"]


@pytest.mark.parametrize("engine", ["disagg", "distserve"])
def test_a_well_known_model_needs_no_file(engine: str, trace: Path, tmp_path: Path) -> None:
    placement = tmp_path / "placement.yaml"
    placement.write_text(
        "groups:\n- {role: prefill, count: 1, tensor_parallel: 3, pipeline_parallel: 3}\n"
        "- {role: decode, count: 1, tensor_parallel: 4, pipeline_parallel: 3}\n"
    )
    flags = ["--latency", "a100-sxm", "--model", "opt-175b", "--engine", engine, "--placement", placement]
    found = report("--workload", trace, *flags)
    assert found["platform"] == "opt-175b on a100-sxm, roofline"
    assert found["num_devices"] == 21


def test_operator_tables(trace: Path, model: Path, reference_data: Path) -> None:
    tables = reference_data / "silicon" / "aiconfigurator" / "h100_sxm"
    found = report("--workload", trace, "--latency", tables, "--model", model)
    assert found["platform"] == "seven on h100-sxm, measured operators"
    assert "median" in found["latency_errors"]["matmul, from its neighbours"]


def write_cluster(folder: Path, nodes: str, network: str = "network: {kind: tcp, bandwidth: 1 Gbit/s}") -> Path:
    path = folder / "cluster.yaml"
    path.write_text(f"nodes: [{nodes}]\n{network}\n")
    return path


def test_a_cluster_file_says_over_which_links_instances_hand_over(trace: Path, model: Path, tmp_path: Path) -> None:
    """Of two prefill and two decode instances on nodes of two devices, every hand-over crosses the network."""
    flags = ["--workload", trace, "--model", model, "--prefill", 2, "--decode", 2, "--strict-roles"]
    near_file = write_cluster(tmp_path, "{name: big, device: a100-sxm, devices: 4}")
    near = report(*flags, "--cluster", near_file)
    far = report(*flags, "--cluster", write_cluster(tmp_path, "{name: n, count: 2, device: a100-sxm, devices: 2}"))
    assert near["places"] == {
        f"{role}-{n}": [f"big:{i + n}"] for i, role in ((0, "prefill"), (2, "decode")) for n in (0, 1)
    }
    assert far["places"] == {
        f"{role}-{n}": [f"n-{i}:{n}"] for i, role in ((0, "prefill"), (1, "decode")) for n in (0, 1)
    }
    assert far["platform"] == near["platform"] == "seven on a100-sxm, roofline"
    shares = [run["runs"][0]["stage_shares"] for run in (near, far)]
    near_share, far_share = (share["hand_over_wait"] + share["hand_over"] for share in shares)
    assert near_share < 0.02 < 0.3 < far_share
    plain = report(*flags, "--latency", "a100-sxm")
    assert near["runs"] == plain["runs"]
    assert plain["places"] == {}


def test_each_kind_of_device_of_a_cluster_has_its_own_step_times(trace: Path, model: Path, tmp_path: Path) -> None:
    both = "{name: p, device: h200-sxm, devices: 1}, {name: d, device: l40s, devices: 1}"
    flags = ["--workload", trace, "--model", model, "--strict-roles"]
    found = report(*flags, "--cluster", write_cluster(tmp_path, both))
    assert found["platform"] == "seven on h200-sxm, roofline; seven on l40s, roofline"
    h200, l40s = (report(*flags, "--latency", name) for name in ("h200-sxm", "l40s"))
    assert found["runs"][0]["ttft"]["p50"] == pytest.approx(h200["runs"][0]["ttft"]["p50"], rel=0.01)
    assert found["runs"][0]["itl"]["p50"] == pytest.approx(l40s["runs"][0]["itl"]["p50"], rel=0.05)


def test_published_step_times_keep_their_own_link_within_a_node(trace: Path, tmp_path: Path) -> None:
    cluster = write_cluster(tmp_path, "{name: n, device: a100-sxm, devices: 8}")
    found, plain = (report("--workload", trace, *PUBLISHED, *flags) for flags in (["--cluster", cluster], []))
    assert found["runs"] == plain["runs"]
    assert "prefill-0 on n:0" in run("--workload", trace, *PUBLISHED, "--cluster", cluster).stdout


def test_a_profile_describes_the_devices_of_its_cluster(trace: Path, tmp_path: Path) -> None:
    lengths = (1, 16, 100, 512)
    steps = [StepSample(chunks=((start, n),), time_s=0.01 + n * 1e-4) for n in lengths for start in (0, 200, 900)]
    profile = Profile(
        model="m",
        device="this",
        dtype="bfloat16",
        kv_bytes_per_token=20_000,
        steps=(ParallelSamples(tensor_parallel=1, samples=tuple(steps)),),
        link_bytes_per_s=1e10,
    )
    save_profile(profile, tmp_path / "profile.json")
    flags = ["--workload", trace, "--latency", tmp_path / "profile.json"]
    near = report(*flags, "--cluster", write_cluster(tmp_path, "{device: profiled, devices: 2}"))
    far = report(*flags, "--cluster", write_cluster(tmp_path, "{count: 2, device: profiled, devices: 1}"))
    assert near["runs"] == report(*flags)["runs"]
    assert near["places"] == {"prefill-0": ["node:0"], "decode-0": ["node:1"]}
    assert far["runs"][0]["stage_shares"]["hand_over"] > 10 * near["runs"][0]["stage_shares"]["hand_over"]


@pytest.mark.parametrize(
    ("nodes", "network", "arguments", "words"),
    [
        (
            "{device: a100, devices: 1}",
            "",
            [],
            "cluster.yaml is not a cluster: node node: no data sheet of a device 'a100'; there are a1",
        ),
        ("{device: a100-sxm, device_count: 1}", "", [], "there are name, count, device, devices, link, host_link"),
        (
            "{count: 2, device: l40s, devices: 1}",
            "",
            [],
            "cluster.yaml is not a cluster: nothing joins the nodes node-0 and node-1",
        ),
        ("{device: l40s, devices: 2}", "network: {kind: tin, bandwidth: 1}", [], "'tin'"),
        (
            "{device: l40s, devices: 2}",
            "network: {kind: tin, bandwidth: 1}",
            [],
            "there are in-process, shm, pcie, nvl",
        ),
        ("{device: l40s, devices: 1}", "", [], "decode-0 needs 1 free device(s) of one node"),
        ("{device: l40s, devices: 2}", "", ["--latency", "h100-sxm"], "says nothing of l40s"),
        ("{device: profiled, devices: 2}", "", [], "has profiled devices: give their profile as --latency"),
        ("", "", [], "is not a cluster"),
    ],
)
def test_a_cluster_that_cannot_be_is_refused(
    nodes: str, network: str, arguments: list[str], words: str, trace: Path, model: Path, tmp_path: Path
) -> None:
    cluster = write_cluster(tmp_path, nodes, network)
    result = run("--workload", trace, "--model", model, "--cluster", cluster, *arguments)
    assert isinstance(result.exception, ConfigurationError), result.output
    assert words in str(result.exception)


def test_the_cluster_of_the_documentation_can_be_simulated(trace: Path, model: Path, tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "simulator.md").read_text(encoding="utf-8")
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(text.split("```yaml\n")[1].split("```")[0])
    places = report("--workload", trace, "--model", model, "--cluster", cluster, "--prefill", 10, "--decode", 1)[
        "places"
    ]
    assert [places["prefill-0"], places["prefill-9"], places["decode-0"]] == [["gpu-0:0"], ["gpu-1:1"], ["gpu-1:2"]]


def test_scale_and_rate_stretch_the_times(trace: Path) -> None:
    base = report("--workload", trace, *PUBLISHED)["rate"]
    assert report("--workload", trace, *PUBLISHED, "--scale", 2)["rate"] == pytest.approx(2 * base)
    assert report("--workload", trace, *PUBLISHED, "--rate", 5)["rate"] == 5


def test_drawn_arrivals_give_an_interval_over_seeds(tmp_path: Path) -> None:
    path = tmp_path / "lengths.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(f'{{"input_length": {100 + n}, "output_length": {n % 30}}}\n' for n in range(30))
    found = report("--workload", path, "--rate", 8, "--seeds", 3, "--slo", "ttft=60ms,tpot=30ms", *PUBLISHED)
    assert len(found["runs"]) == 3
    assert found["attainment"]["half_width"] > 0
    assert "±" in run("--workload", path, "--rate", 8, "--seeds", 3, *PUBLISHED).stdout


def test_the_decisions_are_written_for_replay(trace: Path, tmp_path: Path) -> None:
    report("--workload", trace, *PUBLISHED, "--events", tmp_path / "log")
    assert {path.name for path in (tmp_path / "log").iterdir()} == {"router.jsonl", "prefill-0.jsonl", "decode-0.jsonl"}


def test_the_course_of_a_run_as_a_page(trace: Path, tmp_path: Path) -> None:
    page = tmp_path / "run.html"
    drawn, plain = report("--workload", trace, *PUBLISHED, "--html", page), report("--workload", trace, *PUBLISHED)
    for found in (drawn, plain):
        del found["runs"][0]["kv"]  # looked at when the scheduler decides, which a page needs it to do more often
    assert drawn == plain
    text = page.read_text(encoding="utf-8")
    data = json.loads(text.split("const data = ")[1].split(";\nconst")[0])
    assert [lane["instance"] for lane in data["lanes"]] == ["prefill-0", "decode-0"]
    assert len(data["hand_overs"]) == 40
    assert sum(data["lanes"][0]["prefill_tokens"]) == sum(100 + 37 * number % 900 for number in range(40))
    for lane in data["lanes"]:
        assert all(start < end for start, end in zip(lane["start_s"], lane["end_s"], strict=True))
    assert "http" not in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--engine", "distserve"], "give --model"),
        (["--engine", "distserve", "--model", "opt-175b"], "no published fits for facebook/opt-175b"),
        ([*PUBLISHED, "--colocated", "1"], "engine distserve has no colocated instances"),
        ([], "Give --latency"),
        ([], "a100-sxm, h100-sxm, h200-sxm"),
        (["--latency", "abacus"], "there are a100-sxm"),
        (["--latency", "h100"], "h200-sxm, l40s, zen5-core, published; did you mean h100-sxm?"),
        (["--engine", "distserve", "--model", "opt-14b"], "did you mean facebook/opt-13b?"),
        (["--latency", "h100-sxm", "--model", "facebook/opt-66b"], "facebook/opt-66b (131.4 GB) leave no room for KV"),
        (["--latency", "published", "--model", "opt-13b"], "published latencies are those of other engines"),
        (["--latency", "nowhere.json"], "cannot read the profile"),
        (["--latency", "a100-sxm", "--model", "nowhere/config.json"], "cannot read nowhere/config.json"),
        ([*PUBLISHED, "--rate", "1", "--scale", "2"], "give one of them"),
    ],
)
def test_what_cannot_be_simulated_is_refused(arguments: list[str], words: str, trace: Path) -> None:
    result = run("--workload", trace, *arguments)
    assert isinstance(result.exception, ConfigurationError)
    assert words in str(result.exception)


@pytest.mark.parametrize("slo", ["ttft=1", "ttft=1s,ttft=2s", "e2e=1s", "ttft=-1s", ""])
def test_what_is_no_objective_is_refused(slo: str, trace: Path) -> None:
    result = run("--workload", trace, *PUBLISHED, "--slo", slo)
    assert result.exit_code == 2
    assert "is not a pair of objectives" in result.output


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "arrival_s,prompt_len\n0,1\n", "has no pair of columns"),
        ("a.csv", "arrival_s,prompt_len,output_len\n0,10,5\n-1,10,5\n", "line 3: arrival at -1.0 s is negative"),
        ("a.csv", "arrival_s,prompt_len,output_len\n2,10,5\n1,10,5\n", "line 3: arrival at 1.0 s is before"),
        ("a.csv", "arrival_s,prompt_len,output_len\n0,ten,5\n", "line 2: invalid literal"),
        ("a.csv", "arrival_s,prompt_len,output_len\n0,0,5\n", "line 2: 0 prompt and 5 output tokens cannot be"),
        ("a.csv", "arrival_s,prompt_len,output_len\n", "holds no requests"),
        ("a.jsonl", '{"input_length": 3, "output_length": 2}\nnonsense\n', "line 2: JSON is malformed"),
        ("a.jsonl", '{"input_length": 3}\n', "missing required field `output_length`"),
        ("a.jsonl", "[1, 2]\n", "line 1: Expected `object`, got `array`"),
        ("a.jsonl", '{"input_length": 3, "output_length": 2}\n', "give --rate"),
        ("a.txt", "", "neither .jsonl nor .csv"),
        (
            "a.csv",
            "arrival_s,prompt_len,output_len\n0,10,5\n1,99999,5\n",
            "request a.csv:3 (99999 + 5 tokens) never fits",
        ),
    ],
)
def test_a_bad_workload_is_refused_with_its_line(name: str, text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    result = run("--workload", tmp_path / name, *PUBLISHED)
    assert isinstance(result.exception, ConfigurationError)
    assert words in str(result.exception)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--engine", "distserv"], "there are disagg, distserve, vllm-0.2.3; did you mean distserve?"),
        (["--scheduling", "chunkd"], "there are chunked, prefill-first, decode-first, slack; did you mean chunked?"),
        (["--arrivals", "poison"], "did you mean poisson?"),
        (["--slo", "ttft=1h"], "no unit is called 'h'; there are us, ms, s, min"),
        (["--slo", "ttf=1s"], "no objective is called 'ttf'; there are ttft, tpot; did you mean ttft?"),
        (["--slo", f"ttft={'9' * 400}s"], "above 0, at most a day"),
        (["--slo", "ttft=0ms"], "above 0, at most a day"),
        (["--rate", "nan"], "nan"),
        (["--rate", "inf"], "inf"),
        (["--scale", "nan"], "nan"),
        (["--cv", "inf"], "inf"),
        (["--spread-batches", "nan"], "nan"),
        (["--longest-think", "inf"], "inf"),
        (["--attainment", "nan"], "nan"),
        (["--lease-s", "nan"], "nan"),
        (["--requests", "9" * 30], "no number up to"),
        (["--prefill", "99999999999"], "not in the range"),
        (["--events", __file__], "it is no folder"),
        (["--html", "no/such/page.html"], "there is no folder"),
        (["--html", "."], "it is a folder"),
    ],
)
def test_values_of_flags_that_cannot_be_are_refused_in_words(flags: list[str], words: str, trace: Path) -> None:
    result = run("--workload", trace, *PUBLISHED, *flags)
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())


def test_a_workload_of_no_name_is_answered_with_those_there_are() -> None:
    result = run("--workload", "chatt", "--rate", 1, *PUBLISHED)
    assert isinstance(result.exception, ConfigurationError)
    assert "there are chat, code, summarise, reason; did you mean chat?" in str(result.exception)


def test_requests_that_all_come_at_once(tmp_path: Path) -> None:
    path = tmp_path / "burst.csv"
    path.write_text("arrival_s,prompt_len,output_len\n" + "5,10,5\n" * 50)
    scaled = run("--workload", path, *PUBLISHED, "--scale", 2)
    assert isinstance(scaled.exception, ConfigurationError)
    assert "all its requests at one time: give --rate" in str(scaled.exception)
    burst, drawn = report("--workload", path, *PUBLISHED), report("--workload", path, *PUBLISHED, "--rate", 0.1)
    assert burst["runs"][0]["ttft"]["p90"] > drawn["runs"][0]["ttft"]["p90"]
    single = report("--workload", path, *PUBLISHED, "--requests", 1, "--rate", 2)
    assert single["runs"][0]["num_finished"] == 1


@pytest.mark.parametrize(
    "flags", [["--rate", "1e-300"], ["--scale", "1e-300"], ["--rate", "1e-9", "--arrivals", "gamma"]]
)
def test_rates_at_which_a_run_would_not_end_are_refused(flags: list[str], trace: Path) -> None:
    result = run("--workload", trace, *PUBLISHED, *flags)
    assert isinstance(result.exception, ConfigurationError)
    assert "give a higher rate" in str(result.exception)


def test_requests_years_apart_are_simulated(tmp_path: Path) -> None:
    path = tmp_path / "far.csv"
    path.write_text("arrival_s,prompt_len,output_len\n0,10,5\n9e9,10,5\n")
    assert report("--workload", path, *PUBLISHED)["runs"][0]["num_finished"] == 2


def test_a_standard_workload_needs_no_file() -> None:
    found = report("--workload", "chat", "--rate", 3, "--requests", 50, *PUBLISHED)
    assert found["runs"][0]["num_requests"] == 50


def test_sessions_of_agents_wait_for_their_answers(tmp_path: Path) -> None:
    path = tmp_path / "sessions.jsonl"
    call = {"input_length": 100, "output_length": 11, "think_ms": 5000, "hash_runs": [[1, 1]]}
    path.write_text("".join(json.dumps({"session_id": "a", **call}) + "\n" for _ in range(4)))
    found = report("--sessions", path, "--rate", 1, *PUBLISHED)["runs"][0]
    assert found["num_finished"] == 4
    assert found["span_s"] > 15
    refused = run("--sessions", path, *PUBLISHED)
    assert "needs --rate" in str(refused.exception)


def test_lengths_without_a_workload() -> None:
    found = report("--prompt-len", 512, "--output-len", 20, "--rate", 2, "--requests", 30, *PUBLISHED)
    assert found["runs"][0]["num_finished"] == 30


def test_a_missing_workload_is_refused() -> None:
    result = run("--workload", "nowhere.csv", *PUBLISHED)
    assert isinstance(result.exception, ConfigurationError)
    assert "cannot read the trace nowhere.csv" in str(result.exception)


CLASSES = """
groups: [{role: colocated, count: 1}]
classes:
  chat: {slo: 'ttft=1s,tpot=200ms', priority: -10, overload: shed}
  batch: {slo: 'ttft=60min,tpot=60s', priority: 10}
"""
ALIKE = CLASSES.replace(", priority: -10, overload: shed", "").replace(", priority: 10", "")


def test_classes_of_service_are_held_to_their_own_objectives(tmp_path: Path, model: Path) -> None:
    trace, alike, apart = (tmp_path / name for name in ("mixed.csv", "alike.yaml", "apart.yaml"))
    alike.write_text(ALIKE)
    apart.write_text(CLASSES)
    rows = [f"{number * 0.02},{1000 if number % 2 else 100},8,{('chat', 'batch')[number % 2]}" for number in range(200)]
    trace.write_text("\n".join(("arrival_s,prompt_len,output_len,service_class", *rows)))
    engine = ("--model", model, "--latency", "l40s", "--kv-memory", "16GiB", "--no-strict-roles")
    flags = ("--workload", trace, *engine, "--queue", "priority", "--slo", "ttft=1s,tpot=200ms")
    found = {}
    for file in (alike, apart):
        batch, chat = report(*flags, "--placement", file)["runs"][0]["classes"]
        assert (batch["name"], batch["num_requests"], batch["num_refused"]) == ("batch", 100, 0)
        assert (chat["name"], chat["num_requests"]) == ("chat", 100)
        assert batch["attainment"] == 1.0
        found[file] = chat["attainment"]
    assert found[apart] > found[alike] + 0.2
    printed = run(*flags, "--placement", apart).output
    assert "class batch: 100.0% of 100 requests kept their objectives, 0 refused" in printed.replace("\n", " ")
    assert "class" not in run(*flags, "--colocated", 1, "--prefill", 0, "--decode", 0).output


@pytest.mark.parametrize("file", ["a.csv", "a.jsonl"])
def test_a_class_that_is_none_is_refused_with_its_line(tmp_path: Path, model: Path, file: str) -> None:
    trace, placement = tmp_path / file, tmp_path / "placement.yaml"
    placement.write_text(CLASSES)
    rows = {
        "a.csv": "prompt_len,output_len,service_class\n10,1,\n10,1,chatt\n",
        "a.jsonl": '{"input_length": 10, "output_length": 1}\n'
        '{"input_length": 10, "output_length": 1, "service_class": "chatt"}\n',
    }
    trace.write_text(rows[file])
    flags = ("--model", model, "--latency", "l40s", "--kv-memory", "16GiB", "--placement", placement)
    result = run("--workload", trace, *flags, "--rate", 1)
    assert isinstance(result.exception, ConfigurationError)
    assert "line " in str(result.exception)
    assert "called 'chatt': there are chat, batch; did you mean chat?" in str(result.exception)


def test_equal_hash_ids_are_equal_blocks_only_after_equal_beginnings(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    ids = ([1, 2], [1, 3], [4, 2])
    path.write_text(
        "".join(
            json.dumps({"timestamp": 0, "input_length": 1000, "output_length": 1, "hash_ids": i}) + "\n" for i in ids
        )
    )
    requests = simulated_requests(Trace(path).rows(), path.name, block_size=32)
    first, second, third = (request.block_hashes for request in requests)
    assert len(first) == 1000 // 32
    assert first[:16] == second[:16]
    assert not set(first[16:]) & set(second[16:])
    assert not set(first) & set(third)


def test_instances_are_added_as_a_server_would_add_them(model: Path) -> None:
    flags = ("--model", model, "--latency", "l40s", "--kv-memory", "16GiB", "--prompt-len", 1000, "--output-len", 10)
    load = (*flags, "--rate", 30, "--requests", 600, "--slo", "ttft=1s,tpot=200ms")
    alone, scaled = report(*load), report(*load, "--autoscale", "prefill=1..4,decode=1..2")
    assert scaled["attainment"]["mean"] > alone["attainment"]["mean"] + 0.2


def test_instances_are_not_added_to_a_cluster(model: Path, tmp_path: Path) -> None:
    cluster = write_cluster(tmp_path, "{device: l40s, devices: 4}")
    flags = ("--model", model, "--cluster", cluster, "--autoscale", "decode=1..2", "--prompt-len", 9, "--output-len", 9)
    result = run(*flags, "--rate", 1)
    assert isinstance(result.exception, ConfigurationError), result.output
    assert "leave out --cluster" in str(result.exception)
