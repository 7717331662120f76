"""A scheduler's life as a record, and its replay: the same events must give a fresh scheduler the same actions."""

from collections.abc import Iterable
from itertools import zip_longest
from typing import TypeVar

import msgspec

from disagg.base.config import SchedulerSettings
from disagg.base.errors import ProtocolError
from disagg.scheduling.step.actions import AnyAction
from disagg.scheduling.step.events import AnyEvent
from disagg.scheduling.step.scheduler import StepScheduler

_Row = TypeVar("_Row")


class LogHeader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that a scheduler is made from."""

    settings: SchedulerSettings
    num_blocks: int
    block_size: int
    prefix_caching: bool


class LogRecord(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One call of the scheduler: what happened up to ``now``, and what it decided."""

    now: float
    events: tuple[AnyEvent, ...]
    actions: tuple[AnyAction, ...]


class SchedulerLog(msgspec.Struct, frozen=True, kw_only=True):
    """A whole record."""

    header: LogHeader
    records: tuple[LogRecord, ...]


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """The first action in which a replay departs from the record. None stands for no action."""

    record: int
    now: float
    recorded: AnyAction | None
    replayed: AnyAction | None


def parse_log(lines: Iterable[bytes]) -> SchedulerLog:
    """Read a log of JSON lines, header first. A last line that was cut short is left out.

    Raises ProtocolError, with the number of the line, when it is no such log.
    """
    rows = list(lines)
    if rows and not rows[-1].endswith(b"\n"):
        rows.pop()
    if not rows:
        raise ProtocolError("the scheduler log has no header")
    return SchedulerLog(
        header=_parse(rows[0], 1, LogHeader),
        records=tuple(_parse(row, number, LogRecord) for number, row in enumerate(rows[1:], start=2)),
    )


def _parse(row: bytes, number: int, kind: type[_Row]) -> _Row:
    try:
        return msgspec.json.decode(row, type=kind)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"line {number} of the scheduler log: {error}") from error


def replay(log: SchedulerLog) -> Difference | None:
    """Feed the record's events to a fresh scheduler; return the first difference, or None when all is the same."""
    header = log.header
    scheduler = StepScheduler(header.settings, header.num_blocks, header.block_size, header.prefix_caching)
    for index, record in enumerate(log.records):
        replayed = scheduler.handle(record.events, record.now)
        for ours, theirs in zip_longest(record.actions, replayed):
            if ours != theirs:
                return Difference(record=index, now=record.now, recorded=ours, replayed=theirs)
    return None
