"""``disagg bench serve`` and ``disagg bench goodput`` against a small server in this process."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from disagg.bench.client.progress import LoadProgress
from disagg.bench.report.saved import read_results
from disagg.cli.bench_goodput import Factors
from disagg.cli.bench_load import describe_progress
from disagg.cli.main import main
from disagg.measure.record import read_records
from openai_server import Received, Reply, answer_at_once, fake_server

LENGTHS = ("--prompt-len", "40", "--output-len", "3")


@pytest.fixture(autouse=True)
def _needs_the_default_model(default_model: Any) -> None:
    """Its tokenizer makes the prompts."""


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["bench", *arguments])


async def refuse_every_second(received: Received, reply: Reply) -> None:
    if received.index in (1, 3, 5):
        reply.status(429, {"error": {"message": "queue is full"}})
    else:
        await answer_at_once(received, reply)


async def refuse_all(received: Received, reply: Reply) -> None:
    if received.index >= 0:
        reply.status(503)
    else:
        await answer_at_once(received, reply)


def test_a_run_is_told_in_a_table() -> None:
    with fake_server() as server:
        told = bench("serve", "--url", server.url, *LENGTHS, "--rate", "500", "--requests", "6")
    assert told.exit_code == 0, told.output
    for words in ("fake-model", "6 requests of 40 in, 3 out", "TTFT", "longest gap", "6 of 6", "attainment", "client"):
        assert words in told.stdout
    assert "one run is a look, no claim" in told.stdout


def test_a_run_as_json_says_everything() -> None:
    with fake_server(refuse_every_second) as server:
        told = bench(
            *("serve", "--url", server.url, *LENGTHS, "--rate", "500", "--requests", "6", "--json"),
            *("--goodput", "ttft:5000", "tpot:5000"),
        )
    report = json.loads(told.stdout)
    (run,) = report["runs"]
    assert report["slo"] == {"ttft_s": 5.0, "tpot_s": 5.0}
    assert run["summary"]["errors"] == {"HTTP 429": 3}
    assert run["summary"]["attainment"]["count"] == 3
    assert report["attainment"] == {"mean": 0.5, "half_width": None}
    assert run["client"]["cores"] > 0


def test_several_seeds_give_an_interval_and_a_file_each(tmp_path: Path) -> None:
    with fake_server() as server:
        told = bench(
            *("serve", "--url", server.url, *LENGTHS, "--rate", "500", "--requests", "4", "--seeds", "3"),
            *("--records", str(tmp_path / "r.jsonl"), "--save", str(tmp_path / "saved.json"), "--name", "mine"),
        )
    assert told.exit_code == 0, told.output
    assert "3 runs" in told.stdout
    assert "±" in told.stdout
    assert "one run" not in told.stdout
    assert [len(list(read_records(tmp_path / f"r-seed{seed}.jsonl"))) for seed in range(3)] == [4, 4, 4]
    runs = read_results(tmp_path / "saved.json").runs
    assert [(run.system, run.seed, len(run.records)) for run in runs] == [("mine", seed, 4) for seed in range(3)]


def test_users_and_sessions_are_loads_too(tmp_path: Path) -> None:
    calls = [{"session_id": "a", "input_length": 40, "output_length": 2, "hash_runs": [[0, 1]]}] * 3
    trace = tmp_path / "sessions.jsonl"
    trace.write_text("\n".join(json.dumps(call) for call in calls))
    with fake_server() as server:
        users = bench("serve", "--url", server.url, *LENGTHS, "--users", "2", "--requests", "5", "--endpoint", "chat")
        sessions = bench("serve", "--url", server.url, "--sessions", str(trace), "--users", "1")
    assert "2 users" in users.stdout
    assert "5 of 5" in users.stdout
    assert "1 sessions of 1 users" in sessions.stdout
    assert "3 of 3" in sessions.stdout


def test_nothing_finished_is_a_failure_but_misses_are_not() -> None:
    with fake_server(refuse_all) as server:
        nothing = bench("serve", "--url", server.url, *LENGTHS, "--rate", "500", "--requests", "2")
    with fake_server(refuse_every_second) as server:
        some = bench("serve", "--url", server.url, *LENGTHS, "--rate", "500", "--requests", "2")
    assert nothing.exit_code == 1
    assert "0 of 2, 2 HTTP 503" in nothing.stdout
    assert some.exit_code == 0


def test_records_as_parquet(tmp_path: Path) -> None:
    path = tmp_path / "records.parquet"
    with fake_server() as server:
        told = bench("serve", "--url", server.url, *LENGTHS, "--rate", "500", "--requests", "3", "--records", str(path))
    try:
        import pyarrow.parquet as pq
    except ImportError:
        assert told.exit_code == 2
        assert "pip install 'disagg[parquet]'" in told.output
    else:
        table = pq.read_table(path)
        assert table.num_rows == 3
        assert table.column("event_tokens").to_pylist() == [[1, 1, 1]] * 3
        assert {"ttft_s", "ending", "stages"} <= set(table.column_names)


def test_parquet_that_cannot_be_written_is_said_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with fake_server() as server:
        told = bench("serve", "--url", server.url, *LENGTHS, "--rate", "9", "--records", str(tmp_path / "r.parquet"))
    assert told.exit_code == 2
    assert "pip install 'disagg[parquet]'" in told.output
    assert not server.received


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "give --workload"),
        ((*LENGTHS, "--users", "2", "--rate", "3"), "leave out --rate"),
        ((*LENGTHS, "--rate", "3", "--records", "r.csv"), ".jsonl or .parquet"),
        ((*LENGTHS, "--rate", "3", "--records", "no/such/folder/r.jsonl"), "there is no folder"),
        ((*LENGTHS, "--rate", "3", "--save", f"{__file__}/r.json"), "there is no folder"),
        ((*LENGTHS, "--rate", "3", "--save", "."), "it is a folder"),
        ((*LENGTHS, "--rate", "3", "--extra-body", "[1]"), "not a JSON object"),
        ((*LENGTHS, "--rate", "3", "tpot:100"), "unexpected argument 'tpot:100'"),
        ((*LENGTHS, "--rate", "3", "--slo", "ttft=1s", "--goodput", "ttft:1"), "give one of them"),
        ((*LENGTHS, "--rate", "3", "--tokenizer", "./nothing"), "no such model"),
        (("--workload", "chat"), "--rate"),
    ],
)
def test_flags_that_contradict_are_said_before_anything_is_sent(arguments: tuple[str, ...], words: str) -> None:
    told = bench("serve", "--url", "http://127.0.0.1:1", *arguments)
    assert told.exit_code == 2
    assert words in told.output


def test_no_server_is_said_in_words() -> None:
    told = bench("serve", "--url", "http://127.0.0.1:1", *LENGTHS, "--rate", "3")
    assert told.exit_code == 1
    assert "start a server with: disagg serve" in told.output


def goodput(server_url: str, *arguments: str) -> Result:
    quick = ("--run-s", "0.01", "--min-requests", "4", "--rate", "400", "--tolerance", "0.5")
    return bench("goodput", "--url", server_url, *LENGTHS, *quick, *arguments)


def test_a_server_that_keeps_every_objective_has_at_least_the_highest_rate_tried(tmp_path: Path) -> None:
    path = tmp_path / "search.json"
    status = {"instances": [{"state": "ready"}, {"state": "ready"}]}
    with fake_server(pages={"/status": status}) as server:
        told = goodput(server.url, "--slo", "ttft=60s", "--grid", "0.5", "--save", str(path), "--json")
    report = json.loads(told.stdout)
    assert report["missed_rate"] is None
    assert report["num_devices"] == 2
    assert report["goodput"] == report["rate"] / 2
    assert all(point["is_met"] for point in report["points"])
    assert [point["attainment"]["share"] for point in report["scales"]] == [1.0] * 11
    saved = read_results(path)
    assert saved.goodput[0].rate.mean == report["rate"]
    assert len(saved.runs) == len(report["points"])


def test_a_server_that_keeps_none_is_told_so() -> None:
    with fake_server() as server:
        told = goodput(server.url, "--slo", "ttft=1us", "--grid", "")
    assert told.exit_code == 0, told.output
    assert "goodput  none: one request at a time misses ttft=0.001ms as well" in told.stdout
    assert "assumed" not in told.stdout
    assert "one seed is a look, no claim" in told.stdout


def test_a_run_takes_limits_on_percentiles() -> None:
    slo = ("--slo", "ttft=60s@80%,e2e.p99<=1us")
    with fake_server() as server:
        told = bench("serve", "--url", server.url, *LENGTHS, "--rate", "400", "--requests", "3", *slo).stdout
    assert "target      ttft=60s@80%,e2e.p99<=0.001ms: missed, e2e.p99" in told


def test_factors_of_a_grid() -> None:
    assert Factors().convert("0.5, 2", None, None) == (0.5, 2.0)
    assert Factors().convert("", None, None) == ()
    assert bench("goodput", "--grid", "0").exit_code == 2
    assert bench("goodput", "--grid", "a").exit_code == 2


def test_progress_in_a_line() -> None:
    progress = LoadProgress(
        elapsed_s=3.0,
        num_requests=10,
        num_sent=7,
        num_finished=4,
        num_failed=1,
        ttft_s=0.1,
        tpot_s=0.02,
        request_rate=2.0,
        output_tokens_per_s=64.0,
    )
    line = "4/10 finished, 1 failed, 2 running, 2.00 requests/s, 64 tokens/s, TTFT 100 ms, TPOT 20.0 ms"
    assert describe_progress(progress) == line


def test_help_names_every_benchmark() -> None:
    told = bench("--help").stdout
    for name in ("serve", "goodput", "engine"):
        assert name in told
