"""A dispatcher's life as a record, and its replay: the same events must give a fresh dispatcher the same actions.

The record is JSON lines: a ``DispatchHeader``, then one ``DispatchRecord`` for each call of ``Dispatcher.handle``.
"""

from collections.abc import Iterable, Iterator
from typing import TypeVar

import msgspec

from disagg.base.config import RouterSettings
from disagg.base.errors import InternalError, ProtocolError
from disagg.base.ids import InstanceId
from disagg.base.request import Role
from disagg.scheduling.dispatch.actions import AnyDispatchAction
from disagg.scheduling.dispatch.dispatcher import Dispatcher
from disagg.scheduling.dispatch.events import AnyDispatchEvent

_Row = TypeVar("_Row")


class DispatchHeader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that a dispatcher is made from."""

    instances: dict[InstanceId, Role]
    settings: RouterSettings


class DispatchRecord(msgspec.Struct, frozen=True, kw_only=True, array_like=True, omit_defaults=True):
    """One call of the dispatcher: what happened at ``now``, and what it decided."""

    now: float
    event: AnyDispatchEvent
    actions: tuple[AnyDispatchAction, ...]
    fault: str = ""
    """What it raised instead."""


class DispatchLog(msgspec.Struct, frozen=True, kw_only=True):
    """A whole record."""

    header: DispatchHeader
    records: tuple[DispatchRecord, ...]


class DispatchDifference(msgspec.Struct, frozen=True, kw_only=True):
    """The first call in which a replay departs from the record, by its number from 0."""

    record: int
    recorded: DispatchRecord
    replayed: DispatchRecord


def handle_and_record(dispatcher: Dispatcher, event: AnyDispatchEvent, now: float) -> DispatchRecord:
    """Call ``Dispatcher.handle`` and return the call; an InternalError becomes its ``fault``."""
    try:
        actions = tuple(dispatcher.handle(event, now))
    except InternalError as error:
        return DispatchRecord(now=now, event=event, actions=(), fault=str(error))
    return DispatchRecord(now=now, event=event, actions=actions)


def parse_dispatch_log(lines: Iterable[bytes]) -> DispatchLog:
    """Read a log. A last line that was cut short is left out.

    Raises ProtocolError, with the number of the line, when it is no such log.
    """
    rows = _whole_rows(lines)
    try:
        header = _parse(next(rows), 1, DispatchHeader)
    except StopIteration:
        raise ProtocolError("the dispatch log has no header") from None
    records = tuple(_parse(row, number, DispatchRecord) for number, row in enumerate(rows, start=2))
    return DispatchLog(header=header, records=records)


def replay_dispatch(log: DispatchLog) -> DispatchDifference | None:
    """Feed the record's events to a fresh dispatcher; return the first difference, or None when all is the same."""
    dispatcher = Dispatcher(log.header.instances, log.header.settings)
    for index, record in enumerate(log.records):
        replayed = handle_and_record(dispatcher, record.event, record.now)
        if replayed != record:
            return DispatchDifference(record=index, recorded=record, replayed=replayed)
    return None


def _whole_rows(lines: Iterable[bytes]) -> Iterator[bytes]:
    return (line for line in lines if line.endswith(b"\n"))


def _parse(row: bytes, number: int, kind: type[_Row]) -> _Row:
    try:
        return msgspec.json.decode(row, type=kind)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"line {number} of the dispatch log: {error}") from error
