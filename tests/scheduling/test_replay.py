"""The record of a core: what a replay finds, what is no record, and what a full disk does."""

import errno
from pathlib import Path

import msgspec
import pytest

from disagg.base.config import RouterSettings, SchedulerSettings
from disagg.base.errors import ConfigurationError, ProtocolError
from disagg.base.event_log import EventLog
from disagg.base.ids import Epoch, InstanceId, RequestId
from disagg.base.request import Role
from disagg.base.sampling import FinishReason
from disagg.scheduling.dispatch.events import PullEnded, SequenceArrived, SequenceCancelled
from disagg.scheduling.event_log import CoreLog, InstanceRecord, RouterRecord, parse_log, replay
from disagg.scheduling.instance.core import InstanceCore
from disagg.scheduling.instance.header import InstanceHeader
from disagg.scheduling.instance.inputs import AnyInstanceInput, SequenceFacts, Start
from disagg.scheduling.router.core import RouterCore
from disagg.scheduling.router.header import RouterHeader
from disagg.scheduling.router.inputs import ProcessExited
from disagg.scheduling.step.actions import RunStep
from disagg.scheduling.step.events import StepDone, StepResult, Tick

A = RequestId("a")
INPUTS: tuple[tuple[AnyInstanceInput, ...], ...] = (
    (Start(sequence=SequenceFacts(request_id=A, epoch=Epoch(1), num_tokens=5, max_total_tokens=9)),),
    (StepDone(step_id=1, results=(StepResult(A),)),),
    (StepDone(step_id=2, results=(StepResult(A, FinishReason.STOP),)),),
)


@pytest.fixture
def log() -> CoreLog:
    header = InstanceHeader(
        instance=InstanceId("colocated-0"), settings=SchedulerSettings(), num_blocks=8, block_size=4
    )
    core = InstanceCore(header)
    records = tuple(
        InstanceRecord(float(now), inputs, tuple(core.handle(inputs, float(now)))) for now, inputs in enumerate(INPUTS)
    )
    return CoreLog(header=header, records=records)


@pytest.fixture
def router_log() -> CoreLog:
    """A short life: an instance dies before it was ready, a sequence comes, and goes."""
    header = RouterHeader(
        instances={InstanceId("prefill-0"): Role.PREFILL, InstanceId("colocated-0"): Role.COLOCATED},
        settings=RouterSettings(),
    )
    core = RouterCore(header)
    inputs = (
        ProcessExited(instance=InstanceId("prefill-0"), detail="killed"),
        SequenceArrived(request_id=A, epoch=Epoch(0), num_tokens=5, max_total_tokens=9),
        Tick(),
        SequenceCancelled(request_id=A, epoch=Epoch(0)),
    )
    records = tuple(
        RouterRecord(float(now), (one,), tuple(core.handle(one, float(now)))) for now, one in enumerate(inputs)
    )
    return CoreLog(header=header, records=records)


def lines(log: CoreLog) -> list[bytes]:
    return [msgspec.json.encode(entry) + b"\n" for entry in (log.header, *log.records)]


@pytest.mark.parametrize("kind", ["log", "router_log"])
def test_a_record_survives_the_file_and_replays_without_difference(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    written: CoreLog = request.getfixturevalue(kind)
    path = tmp_path / "new" / "events.jsonl"
    with EventLog(path, written.header) as file:
        for record in written.records:
            file.record(record)
    again = parse_log(path.read_bytes().splitlines(keepends=True))
    assert again == written
    assert replay(again) is None


def test_the_first_difference_is_told(log: CoreLog) -> None:
    wrong = msgspec.structs.replace(log.records[1], outputs=())
    difference = replay(msgspec.structs.replace(log, records=(log.records[0], wrong, log.records[2])))
    assert difference is not None
    assert (difference.record, difference.recorded) == (1, None)
    assert difference.replayed == log.records[1].outputs[0]


def test_other_settings_make_other_decisions(log: CoreLog) -> None:
    header = msgspec.structs.replace(log.header, settings=SchedulerSettings(max_batch_tokens=2))
    difference = replay(msgspec.structs.replace(log, header=header))
    assert difference is not None
    assert isinstance(difference.recorded, RunStep)
    assert isinstance(difference.replayed, RunStep)
    assert (difference.recorded.num_tokens, difference.replayed.num_tokens) == (5, 2)


def test_a_line_cut_short_by_a_kill_is_left_out(log: CoreLog) -> None:
    cut = lines(log)
    cut[-1] = cut[-1][:-5]
    assert parse_log(cut).records == log.records[:-1]


@pytest.mark.parametrize(
    ("rows", "words"),
    [([], "no header"), ([b"{}\n"], "line 1"), ([b"nonsense\n"], "line 1")],
)
def test_something_else_is_refused(rows: list[bytes], words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        parse_log(rows)


def test_a_damaged_line_is_refused_by_its_number(log: CoreLog) -> None:
    damaged = lines(log)
    damaged[2] = b"[1, 2]\n"
    with pytest.raises(ProtocolError, match="line 3"):
        parse_log(damaged)


def test_a_record_of_the_router_in_the_log_of_an_instance_is_refused(log: CoreLog) -> None:
    pulled = PullEnded(request_id=A, epoch=Epoch(1), instance=InstanceId("decode-0"))
    rows = [*lines(log), msgspec.json.encode([3.0, [pulled], []]) + b"\n"]
    with pytest.raises(ProtocolError, match="line 5"):
        parse_log(rows)


def test_a_file_that_cannot_be_written_is_named(log: CoreLog, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="cannot write the event log"):
        EventLog(tmp_path / "file" / "events.jsonl", log.header)


def test_a_full_disk_ends_the_log_and_nothing_else(
    log: CoreLog, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class FullDisk:
        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            pass

    path = tmp_path / "events.jsonl"
    file = EventLog(path, log.header)
    file.record(log.records[0])
    whole, file._file = file._file, FullDisk()  # type: ignore[assignment]
    assert whole is not None
    whole.close()
    for record in log.records[1:]:
        file.record(record)
    assert [record.getMessage() for record in caplog.records] == [
        f"the event log {path} ends here, serving goes on: No space left on device"
    ]
    assert parse_log(path.read_bytes().splitlines(keepends=True)).records == log.records[:1]
