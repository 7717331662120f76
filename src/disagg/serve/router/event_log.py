"""The dispatcher's calls, written down for ``scheduling.dispatch_replay`` as they happen."""

import io
from collections.abc import Mapping
from pathlib import Path

import msgspec

from disagg.base.config import RouterSettings
from disagg.base.errors import ConfigurationError, InternalError
from disagg.base.ids import InstanceId
from disagg.base.request import Role
from disagg.scheduling.dispatch.actions import AnyDispatchAction
from disagg.scheduling.dispatch.dispatcher import Dispatcher
from disagg.scheduling.dispatch.events import AnyDispatchEvent
from disagg.scheduling.dispatch.replay import DispatchHeader, DispatchRecord, handle_and_record


class DispatchLogWriter:
    """Appends to a file, line by line and unbuffered, so that nothing is missing after a kill."""

    def __init__(self, path: Path, instances: Mapping[InstanceId, Role], settings: RouterSettings) -> None:
        """Start a new log, its folder too; raise ConfigurationError when the file cannot be written."""
        self._encoder = msgspec.json.Encoder()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: io.RawIOBase = path.open("wb", buffering=0)
        except OSError as error:
            raise ConfigurationError(f"cannot write the event log {path}: {error.strerror}") from error
        self._write(DispatchHeader(instances=dict(instances), settings=settings))

    def handle(self, dispatcher: Dispatcher, event: AnyDispatchEvent, now: float) -> tuple[AnyDispatchAction, ...]:
        """Call ``Dispatcher.handle`` and write the call down; raise InternalError when it does."""
        record = handle_and_record(dispatcher, event, now)
        self._write(record)
        if record.fault:
            raise InternalError(record.fault)
        return record.actions

    def close(self) -> None:
        """End the log. May be called twice."""
        self._file.close()

    def _write(self, line: DispatchHeader | DispatchRecord) -> None:
        self._file.write(self._encoder.encode(line) + b"\n")
