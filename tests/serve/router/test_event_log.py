"""The dispatcher's log: written as it happens, and replayed."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from disagg.base.config import RouterSettings
from disagg.base.errors import ConfigurationError, InternalError, ProtocolError
from disagg.base.ids import Epoch, InstanceId, RequestId
from disagg.base.request import Role
from disagg.scheduling.dispatch.dispatcher import Dispatcher
from disagg.scheduling.dispatch.events import InstanceUp, PullEnded, SequenceArrived
from disagg.scheduling.dispatch.replay import DispatchLog, parse_dispatch_log, replay_dispatch
from disagg.serve.router.event_log import DispatchLogWriter

INSTANCES = {InstanceId("prefill-0"): Role.PREFILL, InstanceId("decode-0"): Role.DECODE}


@pytest.fixture
def log_path(tmp_path: Path) -> Iterator[Path]:
    """The log of a short life: an instance comes, a sequence is sent to it, and an impossible event is refused."""
    path = tmp_path / "new" / "router.jsonl"
    dispatcher = Dispatcher(INSTANCES, RouterSettings())
    sequence = {"request_id": RequestId("a"), "epoch": Epoch(0)}
    log = DispatchLogWriter(path, INSTANCES, RouterSettings())
    log.handle(dispatcher, InstanceUp(instance=InstanceId("prefill-0"), max_total_tokens=100), 1.0)
    log.handle(dispatcher, SequenceArrived(**sequence, num_tokens=5, max_total_tokens=9), 1.5)
    with pytest.raises(InternalError, match="its story"):
        log.handle(dispatcher, PullEnded(**sequence, instance=InstanceId("prefill-0")), 2.0)
    yield path  # not closed yet: as after a kill
    log.close()


def read(path: Path) -> DispatchLog:
    with path.open("rb") as lines:
        return parse_dispatch_log(lines)


def test_a_log_replays_to_the_same_actions_and_faults(log_path: Path) -> None:
    log = read(log_path)
    assert log.header.instances == INSTANCES
    kinds = [(one.now, type(one.event).__name__, [type(a).__name__ for a in one.actions]) for one in log.records]
    assert kinds == [
        (1.0, "InstanceUp", []),
        (1.5, "SequenceArrived", ["WakeAt", "SendGenerate"]),
        (2.0, "PullEnded", []),
    ]
    assert "pulled by prefill-0" in log.records[2].fault
    assert replay_dispatch(log) is None


def test_a_difference_is_found(log_path: Path) -> None:
    action = b'{"type":"SendGenerate","request_id":'
    log_path.write_bytes(log_path.read_bytes().replace(action + b'"a"', action + b'"b"'))
    difference = replay_dispatch(read(log_path))
    assert difference is not None
    assert difference.record == 1
    assert difference.recorded.actions[1].request_id == "b"
    assert difference.replayed.actions[1].request_id == "a"


def test_a_line_cut_short_by_a_kill_is_left_out(log_path: Path) -> None:
    log_path.write_bytes(log_path.read_bytes()[:-10])
    assert len(read(log_path).records) == 2


def test_what_is_no_log_is_refused_with_the_line(log_path: Path) -> None:
    log_path.write_bytes(log_path.read_bytes() + b"{}\n")
    with pytest.raises(ProtocolError, match="line 5 of the dispatch log"):
        read(log_path)
    with pytest.raises(ProtocolError, match="no header"):
        parse_dispatch_log([])


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="cannot write the event log"):
        DispatchLogWriter(tmp_path / "file" / "router.jsonl", INSTANCES, RouterSettings())
