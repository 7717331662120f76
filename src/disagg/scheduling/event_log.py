"""The life of a core as a record, and its replay: equal inputs must give a fresh core equal outputs.

A record is JSON lines (``base.event_log`` writes them): the header that the core was made from, then each call of
``handle``. Live instances, the live router and the simulator write the same format, without any token value.
"""

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import TypeVar

import msgspec

from disagg.base.errors import ProtocolError
from disagg.scheduling.instance.core import InstanceCore
from disagg.scheduling.instance.header import InstanceHeader
from disagg.scheduling.instance.inputs import AnyInstanceInput
from disagg.scheduling.instance.outputs import AnyInstanceOutput
from disagg.scheduling.router.core import RouterCore
from disagg.scheduling.router.header import RouterHeader
from disagg.scheduling.router.inputs import AnyRouterInput
from disagg.scheduling.router.outputs import AnyRouterOutput

_Row = TypeVar("_Row")


class InstanceRecord(msgspec.Struct, frozen=True, array_like=True):
    """One call of an instance's core: what happened up to ``now``, and what it decided."""

    now: float
    inputs: tuple[AnyInstanceInput, ...]
    outputs: tuple[AnyInstanceOutput, ...]


class RouterRecord(msgspec.Struct, frozen=True, array_like=True):
    """One call of the router's core."""

    now: float
    inputs: tuple[AnyRouterInput, ...]
    outputs: tuple[AnyRouterOutput, ...]


AnyHeader = InstanceHeader | RouterHeader
AnyRecord = InstanceRecord | RouterRecord
AnyOutput = AnyInstanceOutput | AnyRouterOutput


class CoreLog(msgspec.Struct, frozen=True, kw_only=True):
    """A whole record."""

    header: AnyHeader
    records: tuple[AnyRecord, ...]


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """The first output in which a replay departs from the record. None stands for no output."""

    record: int
    now: float
    recorded: AnyOutput | None
    replayed: AnyOutput | None


def parse_log(lines: Iterable[bytes]) -> CoreLog:
    """Read a log, header first. A last line that was cut short by a kill is left out.

    Raises ProtocolError, with the number of the line, when it is no such log.
    """
    rows = list(lines)
    if rows and not rows[-1].endswith(b"\n"):
        rows.pop()
    if not rows:
        raise ProtocolError("the event log has no header")
    header = _decode(rows[0], 1, _HEADERS)
    decoder = _INSTANCE_RECORDS if isinstance(header, InstanceHeader) else _ROUTER_RECORDS
    return CoreLog(
        header=header,
        records=tuple(_decode(row, number, decoder) for number, row in enumerate(rows[1:], start=2)),
    )


def replay(log: CoreLog) -> Difference | None:
    """Feed the record's inputs to a fresh core; return the first difference, or None when all is the same."""
    core = InstanceCore(log.header) if isinstance(log.header, InstanceHeader) else RouterCore(log.header)
    for index, record in enumerate(log.records):
        for ours, theirs in zip_longest(record.outputs, _handle(core, record)):
            if ours != theirs:
                return Difference(record=index, now=record.now, recorded=ours, replayed=theirs)
    return None


def _handle(core: InstanceCore | RouterCore, record: AnyRecord) -> Sequence[AnyOutput]:
    if isinstance(core, InstanceCore) and isinstance(record, InstanceRecord):
        return core.handle(record.inputs, record.now)
    if isinstance(core, RouterCore) and isinstance(record, RouterRecord):
        return [output for one in record.inputs for output in core.handle(one, record.now)]
    raise ProtocolError("the event log mixes records of an instance and of the router")


_HEADERS: msgspec.json.Decoder[AnyHeader] = msgspec.json.Decoder(AnyHeader)
_INSTANCE_RECORDS: msgspec.json.Decoder[AnyRecord] = msgspec.json.Decoder(InstanceRecord)
_ROUTER_RECORDS: msgspec.json.Decoder[AnyRecord] = msgspec.json.Decoder(RouterRecord)


def _decode(row: bytes, number: int, decoder: "msgspec.json.Decoder[_Row]") -> _Row:
    try:
        return decoder.decode(row)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"line {number} of the event log: {error}") from error
