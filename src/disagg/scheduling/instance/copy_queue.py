"""Which pulls run at once: first come, first served, as many as the instance has copiers.

Pulls behind a step of another instance wait for it most of the time: they have copiers of their own.
"""

from collections import deque
from typing import Final

from disagg.base.ids import Epoch, RequestId
from disagg.scheduling.instance.outputs import StartCopy

CopyKey = tuple[RequestId, Epoch]

MAX_BEHIND_STEPS: Final = 4
"""Most pulls behind steps at once."""


class CopyQueue:
    """Copies that wait for a copier, and those under way."""

    def __init__(self, max_at_once: int) -> None:
        self._max_at_once = max_at_once
        self._waiting: deque[StartCopy] = deque()
        self._running: set[CopyKey] = set()
        self._behind: set[CopyKey] = set()

    @property
    def has_waiting(self) -> bool:
        """True while a copy waits."""
        return bool(self._waiting)

    def add(self, copy: StartCopy) -> None:
        """Queue a copy."""
        self._waiting.append(copy)

    def start(self) -> StartCopy | None:
        """Return the next copy to begin now; None while the copiers of all that wait are busy."""
        copy = next((copy for copy in self._waiting if self._has_copier(copy)), None)
        if copy is not None:
            self._waiting.remove(copy)
            (self._behind if copy.offer.behind_step else self._running).add((copy.request_id, copy.epoch))
        return copy

    def _has_copier(self, copy: StartCopy) -> bool:
        if copy.offer.behind_step:
            return len(self._behind) < MAX_BEHIND_STEPS
        return len(self._running) < self._max_at_once

    def end(self, key: CopyKey) -> bool:
        """Note the end of a copy; return False when none of this name runs."""
        found = self.is_running(key)
        self._running.discard(key)
        self._behind.discard(key)
        return found

    def is_running(self, key: CopyKey) -> bool:
        """True while the copy is under way."""
        return key in self._running or key in self._behind

    def withdraw(self, key: CopyKey) -> bool:
        """Take a waiting copy out of the queue; return False when it does not wait."""
        waiting = next((copy for copy in self._waiting if (copy.request_id, copy.epoch) == key), None)
        if waiting is None:
            return False
        self._waiting.remove(waiting)
        return True
