from pathlib import Path

import pytest
import yaml

from disagg.base.errors import ConfigurationError
from disagg.bench.compare.comparison import make_command
from disagg.bench.compare.plan import objectives_of, plan_runs, unloaded_run
from disagg.bench.compare.spec import ComparisonSpec, choose_systems, fill_in, read_spec, split_command
from disagg.measure.slo import Slo

SPEC = """
systems:
  - {name: ours, serve: --prefill 1 --decode 1}
  - {name: theirs, command: "server --port {port} --name 'two words'", ready: /health}
cases:
  - {kind: open_loop, workload: chat, rates: [0.5, 2], requests: 10, slo: [tight, loose]}
  - {kind: closed_loop, prompt_len: 64, output_len: 8, users: [1, 4], requests: 6}
  - {kind: single_stream, prompt_lens: [32, 128], requests: 3}
"""


def read(folder: Path, text: str = SPEC) -> ComparisonSpec:
    path = folder / "spec.yaml"
    path.write_text(text, encoding="utf-8")
    return read_spec(path)


def test_a_spec_becomes_the_same_runs_for_every_system(tmp_path: Path) -> None:
    runs = plan_runs(read(tmp_path), seed=3)
    assert [(run.workload, str(run.load), len(run.requests)) for run in runs] == [
        ("chat", "0.5 requests/s", 10),
        ("chat", "2 requests/s", 10),
        ("64 tokens in, 8 out", "one request at a time", 6),
        ("64 tokens in, 8 out", "4 users", 6),
        ("One request at a time", "32 prompt tokens", 3),
        ("One request at a time", "128 prompt tokens", 3),
    ]
    assert runs == plan_runs(read(tmp_path), seed=3)
    assert runs[0].requests != plan_runs(read(tmp_path), seed=4)[0].requests


def test_a_trace_file_is_stretched_to_each_rate(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("prompt_len,output_len,arrival_s\n10,5,0\n20,6,1\n30,7,2\n", encoding="utf-8")
    slow, fast, *_ = plan_runs(read(tmp_path, SPEC.replace("workload: chat", f"workload: {trace}")), seed=0)
    assert [request.prompt_len for request in fast.requests] == [10, 20, 30]
    assert [request.arrival_s for request in slow.requests] == [0, 2, 4]
    assert [request.arrival_s for request in fast.requests] == [0, 0.5, 1]


def test_no_two_runs_of_a_server_share_texts(tmp_path: Path) -> None:
    spec = read(tmp_path)
    seeds = [run.prompt_seed for seed in range(3) for run in plan_runs(spec, seed)]
    assert len(seeds) == len(set(seeds))
    assert unloaded_run(plan_runs(spec, 0)[0]).prompt_seed not in seeds


def test_objectives_are_given_or_derived_from_the_unloaded_latencies(tmp_path: Path) -> None:
    derived, *_ = plan_runs(read(tmp_path), seed=0)
    assert objectives_of(derived, (0.1, 0.01)) == [
        ("chat, tight objectives", Slo(ttft_s=0.5, tpot_s=0.015)),
        ("chat, loose objectives", Slo(ttft_s=2.5, tpot_s=0.04)),
    ]
    given, *_ = plan_runs(read(tmp_path, SPEC.replace("[tight, loose]", "['ttft=1s,tpot=50ms']")), seed=0)
    assert objectives_of(given, (0, 0)) == [("chat", Slo(ttft_s=1.0, tpot_s=0.05))]


def test_unloaded_latencies_are_those_of_the_median_prompt(tmp_path: Path) -> None:
    run = unloaded_run(plan_runs(read(tmp_path), seed=0)[2])
    assert {request.prompt_len for request in run.requests} == {64}
    assert run.load.num_users == 1


@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        ("kind: open_loop", "kind: open_lop", r"Invalid value 'open_lop' - at `\$.cases\[0\].kind`"),
        ("rates: [0.5, 2]", "rates: [0.5, -2]", r"Expected `float` > 0.* - at `\$.cases\[0\].rates\[1\]`"),
        ("kind: open_loop", "kind: open_lop", r"there are open_loop, .*; did you mean open_loop\?"),
        ("rates: [0.5, 2]", "rate: 0.5", r"there are kind, .*; did you mean rates\?"),
        ("rates: [0.5, 2]", "rates: [0.5, .inf]", r"inf at `\$.cases\[0\].rates\[1\]` is no finite number"),
        ("rates: [0.5, 2]", "rates: [0.5, .nan]", r"\$.cases\[0\].rates\[1\]"),
        ("rates: [0.5, 2]", "rates: [0.5, 1e400]", r"\$.cases\[0\].rates\[1\]"),
        ("name: theirs", "name: theirs, start_deadline_s: .inf", "is no finite number"),
        ("name: theirs", "name: theirs, url: 2024-99-99", "month must be"),
        ("name: theirs", "name: theirs, comand: x", r"there are name, .*; did you mean command\?"),
        ("[tight, loose]", "['ttft=1h']", r"no unit is called 'h'"),
        ("rates: [0.5, 2]", "rate: 0.5", r"Object contains unknown field `rate` - at `\$.cases\[0\]`"),
        ("workload: chat, ", "", "either `workload`, or both `prompt_len` and `output_len`"),
        (
            "[tight, loose]",
            "[tihgt]",
            r"'tihgt' is not a pair of objectives.*or one of tight, loose; did you mean tight\? - at `\$.cases\[0\]`",
        ),
        ("serve: --prefill 1 --decode 1", "ready: /health", r"'ours' needs either `serve`.* - at `\$.systems\[0\]`"),
        ("--port {port}", "--port 8000", r"nothing tells its `command` the \{port\}"),
        ("name: theirs", "name: ours", "`systems` has two of the name 'ours'"),
        ("name: theirs", "name: theirs, comand: x", r"unknown field `comand` - at `\$.systems\[1\]`"),
        ("users: [1, 4]", "users: []", r"length >= 1 - at `\$.cases\[1\].users`"),
        ("kind: single_stream, ", "", r"missing required field `kind` - at `\$.cases\[2\]`"),
    ],
)
def test_a_mistake_is_named_by_its_place(tmp_path: Path, before: str, after: str, complaint: str) -> None:
    assert before in SPEC
    with pytest.raises(ConfigurationError, match=complaint) as caught:
        read(tmp_path, SPEC.replace(before, after))
    assert "spec.yaml" in str(caught.value)


def test_no_file_and_no_yaml(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot read the comparison"):
        read_spec(tmp_path / "absent.yaml")
    with pytest.raises(ConfigurationError, match="is not a comparison"):
        read(tmp_path, "systems: [")


def test_some_of_the_systems_can_be_chosen_in_another_order(tmp_path: Path) -> None:
    spec = read(tmp_path)
    assert [system.name for system in choose_systems(spec, ["theirs", "ours"]).systems] == ["theirs", "ours"]
    assert [system.name for system in choose_systems(spec, ["theirs"]).systems] == ["theirs"]
    with pytest.raises(ConfigurationError, match="no system is called 'vllm'; there are ours, theirs"):
        choose_systems(spec, ["vllm"])


def test_an_unknown_workload_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no workload is called 'chatt'"):
        plan_runs(read(tmp_path, SPEC.replace("workload: chat", "workload: chatt")), seed=0)


def test_commands_are_words_with_variables_and_port() -> None:
    words = split_command("$TOOLS/server --name 'two words' --port {port} --cost 5$$", 8123, {"TOOLS": "/opt/my tools"})
    assert words == ["/opt/my tools/server", "--name", "two words", "--port", "8123", "--cost", "5$"]


def test_a_variable_that_is_not_set_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"'\$PEERS/vllm' names the variable PEERS, which is not set"):
        fill_in("$PEERS/vllm", 1, {})
    with pytest.raises(ConfigurationError, match="cannot be split into words"):
        split_command("server 'half", 1, {})
    with pytest.raises(ConfigurationError, match=r"write \$\$"):
        fill_in("5$ each", 1, {})


def test_our_own_server_is_started_with_the_model_and_its_flags(tmp_path: Path) -> None:
    spec = read(tmp_path, f"model: some-model\n{SPEC}")
    ours, theirs = (make_command(system, spec, 8123) for system in spec.systems)
    assert ours.arguments[1:] == (
        *("-m", "disagg.cli.main", "serve", "some-model", "--prefill", "1", "--decode", "1", "--port", "8123"),
    )
    assert (ours.url, ours.ready) == ("http://127.0.0.1:8123", "/ready")
    assert theirs.arguments == ("server", "--port", "8123", "--name", "two words")
    assert theirs.ready == "/health"


def test_the_shipped_comparisons_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEERS", "/peers")
    folder = Path(__file__).parents[3] / "benchmarks" / "compare"
    paths = sorted(folder.glob("*.yaml"))
    assert {path.name for path in paths} >= {"placements.yaml", "peers.yaml"}
    for path in paths:
        spec = read_spec(path)
        assert plan_runs(spec, seed=0)
        assert all(make_command(system, spec, 8123).arguments for system in spec.systems)
        assert yaml.safe_load(path.read_text())["title"] == spec.title
