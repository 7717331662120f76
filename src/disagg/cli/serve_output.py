"""Where the words of ``disagg serve`` go: to the display that fits stderr, and log messages through it."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from disagg.base.text import one_line
from disagg.cli.serve_display import PlainDisplay, say


@contextmanager
def make_display(as_json: bool, level: int) -> Iterator[PlainDisplay]:
    """Give the display that fits stderr, and send log messages of at least ``level`` the same way."""
    started_s = time.monotonic()
    display = PlainDisplay(as_json=as_json, started_s=started_s)
    if sys.stderr.isatty():
        from disagg.cli.serve_progress import ProgressDisplay

        display = ProgressDisplay(as_json=as_json, started_s=started_s)
    with _logging(level):
        try:
            yield display
        finally:
            display.close()


class _SayHandler(logging.Handler):
    """Writes log messages through ``say``, so that they do not run into a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))


class _Formatter(logging.Formatter):
    """A line for a message, and indented ones for a traceback: nothing in them can look like another message."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines; a traceback that another formatter left in the record does not count."""
        record.exc_text = None
        return super().format(record)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return one_line(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        return "\n".join("    " + one_line(line) for line in super().formatException(ei).splitlines())


@contextmanager
def _logging(level: int) -> Iterator[None]:
    """Show our messages of at least ``level``, and warnings of libraries."""
    handler = _SayHandler()
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
    root, ours = logging.getLogger(), logging.getLogger("disagg")
    level_before = ours.level
    root.addHandler(handler)
    ours.setLevel(level)
    try:
        yield
    finally:
        root.removeHandler(handler)
        ours.setLevel(level_before)
