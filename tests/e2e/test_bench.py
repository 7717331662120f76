"""The load client and this server agree: on lengths, on counts, on who did what; and a search ends with a number."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from server_process import ServerProcess, serving

from disagg.cli.main import main
from disagg.measure.record import Ending, read_records
from disagg.measure.timeline import Stage

SMALL = ("--max-model-len", "512", "--kv-memory", "128MiB")


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with serving(*SMALL) as running:
        yield running


def bench(server: ServerProcess, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["bench", arguments[0], "--url", server.url, *arguments[1:]])


@pytest.mark.parametrize("endpoint", ["completions", "completions-tokens", "chat"])
def test_prompts_and_answers_have_the_lengths_that_were_asked_for(
    server: ServerProcess, endpoint: str, tmp_path: Path
) -> None:
    path = tmp_path / "records.jsonl"
    ended = bench(
        server,
        *("serve", "--prompt-len", "120", "--output-len", "8", "--rate", "20", "--requests", "6", "--json"),
        *("--endpoint", endpoint, "--records", str(path)),
    )
    assert ended.exit_code == 0, ended.stderr
    (run,) = json.loads(ended.stdout)["runs"]
    assert run["notes"] == []
    records = list(read_records(path))
    assert [record.ending for record in records] == [Ending.FINISHED] * 6
    assert {(record.prompt_len, record.num_output_tokens) for record in records} == {(120, 8)}
    for record in records:
        assert record.due_s <= record.sent_s < record.event_s[0] <= record.event_s[-1] <= record.finished_s


def test_the_server_s_stages_are_added_to_the_records(server: ServerProcess, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    lengths = ("--prompt-len", "60", "--output-len", "4")
    ended = bench(server, "serve", *lengths, "--users", "2", "--requests", "4", "--records", str(path))
    assert ended.exit_code == 0, ended.stderr
    assert "time spent" in ended.stdout
    for record in read_records(path):
        assert set(record.stages) <= {stage.value for stage in Stage}
        assert 0 < sum(record.stages.values()) <= record.e2e_s
        assert len(record.instances) == 2


def test_the_goodput_of_a_running_server_is_found(server: ServerProcess) -> None:
    ended = bench(
        server,
        *("goodput", "--prompt-len", "40", "--output-len", "4", "--rate", "4", "--slo", "ttft=1us", "--grid", ""),
        *("--run-s", "0.1", "--min-requests", "4", "--json"),
    )
    assert ended.exit_code == 0, ended.stderr
    report = json.loads(ended.stdout)
    assert report["num_devices"] == 2
    assert report["goodput"] is None
    assert report["missed_rate"] > 0
