"""Server-sent events that differ in one text alone."""

import secrets
from collections.abc import Callable
from typing import Any

from disagg.serve.api.responses import encode, event


class EventTemplate:
    """An event that is encoded once, and then again with other texts in the same place."""

    def __init__(self, make: Callable[[str], Any]) -> None:
        """``make`` returns the struct of an event with a text in one place."""
        mark = secrets.token_hex(16)
        self._before, self._after = event(make(mark)).split(encode(mark))

    def event(self, text: str) -> bytes:
        """Return the event with this text."""
        return self._before + encode(text) + self._after
