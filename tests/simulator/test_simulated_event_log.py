"""A simulation's event log is one of a live deployment: the same files, the same format, and it replays."""

from pathlib import Path

import pytest
from simulated import pair, poisson, serve, stamps

from disagg.base.errors import ConfigurationError
from disagg.scheduling.event_log import parse_log, replay
from disagg.simulator.event_log import EventLogFolder


def simulate_into(folder: Path) -> list[tuple[object, ...]]:
    with EventLogFolder(folder) as log:
        return stamps(serve(pair(), poisson(rate=40, count=40, seed=2), log=log))


def test_the_logs_replay_without_difference(tmp_path: Path) -> None:
    simulate_into(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"router.jsonl", "prefill-0.jsonl", "decode-0.jsonl"}
    for name in ("prefill-0", "decode-0", "router"):
        log = parse_log((tmp_path / f"{name}.jsonl").read_bytes().splitlines(keepends=True))
        assert len(log.records) > 40
        assert replay(log) is None


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        simulate_into(tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_logging_changes_nothing(tmp_path: Path) -> None:
    assert simulate_into(tmp_path) == stamps(serve(pair(), poisson(rate=40, count=40, seed=2)))


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot write the event log"):
        simulate_into(tmp_path / "file")
