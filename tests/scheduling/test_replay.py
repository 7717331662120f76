"""The scheduler's record: what a replay finds, and what is no record."""

import msgspec
import pytest

from disagg.base.config import SchedulerSettings
from disagg.base.errors import ProtocolError
from disagg.base.ids import Epoch, RequestId
from disagg.base.sampling import FinishReason
from disagg.scheduling.step.actions import RunStep
from disagg.scheduling.step.events import AnyEvent, Arrived, StepDone, StepResult
from disagg.scheduling.step.replay import LogHeader, LogRecord, SchedulerLog, parse_log, replay
from disagg.scheduling.step.scheduler import StepScheduler

A = RequestId("a")
EVENTS: tuple[tuple[AnyEvent, ...], ...] = (
    (Arrived(request_id=A, epoch=Epoch(1), num_tokens=5, max_total_tokens=9),),
    (StepDone(step_id=1, results=(StepResult(A),)),),
    (StepDone(step_id=2, results=(StepResult(A, FinishReason.STOP),)),),
)


@pytest.fixture
def log() -> SchedulerLog:
    header = LogHeader(settings=SchedulerSettings(), num_blocks=8, block_size=4, prefix_caching=True)
    scheduler = StepScheduler(header.settings, header.num_blocks, header.block_size, header.prefix_caching)
    records = tuple(
        LogRecord(now=float(now), events=events, actions=tuple(scheduler.handle(events, float(now))))
        for now, events in enumerate(EVENTS)
    )
    return SchedulerLog(header=header, records=records)


def lines(log: SchedulerLog) -> list[bytes]:
    return [msgspec.json.encode(entry) + b"\n" for entry in (log.header, *log.records)]


def test_a_record_survives_the_file_and_replays_without_difference(log: SchedulerLog) -> None:
    again = parse_log(lines(log))
    assert again == log
    assert replay(again) is None


def test_the_first_difference_is_told(log: SchedulerLog) -> None:
    wrong = msgspec.structs.replace(log.records[1], actions=())
    difference = replay(msgspec.structs.replace(log, records=(log.records[0], wrong, log.records[2])))
    assert difference is not None
    assert (difference.record, difference.recorded) == (1, None)
    assert difference.replayed == log.records[1].actions[0]


def test_other_settings_make_other_decisions(log: SchedulerLog) -> None:
    header = msgspec.structs.replace(log.header, settings=SchedulerSettings(max_batch_tokens=2))
    difference = replay(msgspec.structs.replace(log, header=header))
    assert difference is not None
    assert isinstance(difference.recorded, RunStep)
    assert isinstance(difference.replayed, RunStep)
    assert (difference.recorded.num_tokens, difference.replayed.num_tokens) == (5, 2)


def test_a_line_cut_short_by_a_kill_is_left_out(log: SchedulerLog) -> None:
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


def test_a_damaged_line_is_refused_by_its_number(log: SchedulerLog) -> None:
    damaged = lines(log)
    damaged[2] = b"[1, 2]\n"
    with pytest.raises(ProtocolError, match="line 3"):
        parse_log(damaged)
