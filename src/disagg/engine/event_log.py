"""The record of one scheduler's life: a header, then each call's events and actions, one JSON line each."""

import io
from collections.abc import Sequence

import msgspec

from disagg.base.errors import ConfigurationError
from disagg.scheduling.step.actions import AnyAction
from disagg.scheduling.step.events import AnyEvent
from disagg.scheduling.step.replay import LogHeader, LogRecord


class EventLog:
    """Appends to a file, line by line and unbuffered, so that nothing is missing after a kill."""

    def __init__(self, path: str, header: LogHeader) -> None:
        """Start a new log; raise ConfigurationError when the file cannot be written."""
        self._encoder = msgspec.json.Encoder()
        try:
            self._file = io.FileIO(path, "wb")
        except OSError as error:
            raise ConfigurationError(f"cannot write the event log: {error}") from error
        self._write(header)

    def record(self, now: float, events: Sequence[AnyEvent], actions: Sequence[AnyAction]) -> None:
        """Add one call of the scheduler."""
        self._write(LogRecord(now=now, events=tuple(events), actions=tuple(actions)))

    def close(self) -> None:
        """End the log."""
        self._file.close()

    def _write(self, entry: LogHeader | LogRecord) -> None:
        self._file.write(self._encoder.encode(entry) + b"\n")
