"""Saving every decision of a simulation, in the files and the format of a live deployment's event log.

``router.jsonl`` holds the dispatcher's calls, ``<instance>.jsonl`` those of each step scheduler; ``scheduling.replay``
and ``scheduling.dispatch_replay`` read them.
"""

import io
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from disagg.base.config import RouterSettings
from disagg.base.errors import ConfigurationError
from disagg.base.ids import InstanceId
from disagg.base.request import Role
from disagg.scheduling.dispatch.actions import AnyDispatchAction
from disagg.scheduling.dispatch.events import AnyDispatchEvent
from disagg.scheduling.dispatch.replay import DispatchHeader, DispatchRecord
from disagg.scheduling.step.actions import AnyAction
from disagg.scheduling.step.events import AnyEvent
from disagg.scheduling.step.replay import LogHeader, LogRecord


class _LineFile:
    """JSON lines, one struct each."""

    def __init__(self, path: Path, header: msgspec.Struct) -> None:
        self._encoder = msgspec.json.Encoder()
        self._file: io.BufferedWriter = path.open("wb")
        self.write(header)

    def write(self, entry: msgspec.Struct) -> None:
        self._file.write(self._encoder.encode(entry) + b"\n")

    def close(self) -> None:
        self._file.close()


class SchedulerRecorder:
    """The log of one step scheduler."""

    def __init__(self, lines: _LineFile) -> None:
        self._lines = lines

    def record(self, now: float, events: Sequence[AnyEvent], actions: Sequence[AnyAction]) -> None:
        """Add one call."""
        self._lines.write(LogRecord(now=now, events=tuple(events), actions=tuple(actions)))


class DispatchRecorder:
    """The log of the dispatcher."""

    def __init__(self, lines: _LineFile) -> None:
        self._lines = lines

    def record(self, now: float, event: AnyDispatchEvent, actions: Sequence[AnyDispatchAction]) -> None:
        """Add one call."""
        self._lines.write(DispatchRecord(now=now, event=event, actions=tuple(actions)))


class EventLog:
    """The folder of one simulation's logs. Whole once it was closed; use it as a context."""

    def __init__(self, folder: Path) -> None:
        """Make the folder; raise ConfigurationError when that cannot be."""
        self._folder = folder
        self._files = ExitStack()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(f"cannot make the event log's folder {folder}: {error.strerror}") from error

    def scheduler(self, instance: InstanceId, header: LogHeader) -> SchedulerRecorder:
        """Start the log of one instance."""
        return SchedulerRecorder(self._open(f"{instance}.jsonl", header))

    def dispatcher(self, instances: Mapping[InstanceId, Role], settings: RouterSettings) -> DispatchRecorder:
        """Start the log of the router."""
        return DispatchRecorder(
            self._open("router.jsonl", DispatchHeader(instances=dict(instances), settings=settings))
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._files.close()

    def _open(self, name: str, header: msgspec.Struct) -> _LineFile:
        try:
            lines = _LineFile(self._folder / name, header)
        except OSError as error:
            raise ConfigurationError(f"cannot write the event log: {error}") from error
        self._files.callback(lines.close)
        return lines
