"""Where the words of ``disagg serve`` go: to the display that fits stderr, and log messages through it."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

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


@contextmanager
def _logging(level: int) -> Iterator[None]:
    """Show our messages of at least ``level``, and warnings of libraries."""
    handler = _SayHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
    root, ours = logging.getLogger(), logging.getLogger("disagg")
    level_before = ours.level
    root.addHandler(handler)
    ours.setLevel(level)
    try:
        yield
    finally:
        root.removeHandler(handler)
        ours.setLevel(level_before)
