"""A record of decisions on disk: JSON lines, a header first, unbuffered, so that nothing is missing after a kill."""

import io
import logging
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from disagg.base.errors import ConfigurationError

logger = logging.getLogger(__name__)


class EventLog:
    """One file. What it belongs to goes on when the disk is full: the log ends there, and says so once."""

    def __init__(self, path: Path, header: msgspec.Struct) -> None:
        """Start a new log, its folder too; raise ConfigurationError when the file cannot be written."""
        self._path = path
        self._encoder = msgspec.json.Encoder()
        self._file: io.RawIOBase | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("wb", buffering=0)
            self._file.write(self._encoder.encode(header) + b"\n")
        except OSError as error:
            self.close()
            raise ConfigurationError(f"cannot write the event log {path}: {error.strerror}") from error

    def record(self, row: msgspec.Struct) -> None:
        """Add one record; it is dropped once writing has failed."""
        if self._file is None:
            return
        line = self._encoder.encode(row) + b"\n"
        try:
            if self._file.write(line) != len(line):
                raise OSError(0, "only a part of the line could be written")
        except OSError as error:
            logger.error("the event log %s ends here, serving goes on: %s", self._path, error.strerror)
            self.close()

    def close(self) -> None:
        """End the log. May be called twice."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
