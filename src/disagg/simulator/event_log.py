"""Saving every decision of a simulation, in the files and the format of a live deployment's event log.

``router.jsonl`` holds the calls of the router's core, ``<instance>.jsonl`` those of each instance's core;
``scheduling.event_log`` reads and replays them.
"""

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from disagg.base.event_log import EventLog
from disagg.scheduling.instance.header import InstanceHeader
from disagg.scheduling.router.header import RouterHeader


class EventLogFolder:
    """The folder of one simulation's logs. Whole once it was closed; use it as a context."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = ExitStack()

    def router(self, header: RouterHeader) -> EventLog:
        """Start the log of the router; raise ConfigurationError when that cannot be."""
        return self._files.enter_context(EventLog(self._folder / "router.jsonl", header))

    def instance(self, header: InstanceHeader, life: int) -> EventLog:
        """Start the log of one life of an instance: the first, from 0, has no number in its file's name."""
        number = f".{life}" if life else ""
        return self._files.enter_context(EventLog(self._folder / f"{header.instance}{number}.jsonl", header))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._files.close()
