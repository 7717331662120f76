"""Which pulls run at once: first come, first served, as many as the instance has copiers."""

from collections import deque

from disagg.base.ids import Epoch, RequestId
from disagg.scheduling.instance.outputs import StartCopy

CopyKey = tuple[RequestId, Epoch]


class CopyQueue:
    """Copies that wait for a copier, and those under way."""

    def __init__(self, max_at_once: int) -> None:
        self._max_at_once = max_at_once
        self._waiting: deque[StartCopy] = deque()
        self._running: set[CopyKey] = set()

    @property
    def has_waiting(self) -> bool:
        """True while a copy waits."""
        return bool(self._waiting)

    def add(self, copy: StartCopy) -> None:
        """Queue a copy."""
        self._waiting.append(copy)

    def start(self) -> StartCopy | None:
        """Return the next copy to begin now; None while all copiers are busy or nothing waits."""
        if not self._waiting or len(self._running) >= self._max_at_once:
            return None
        copy = self._waiting.popleft()
        self._running.add((copy.request_id, copy.epoch))
        return copy

    def end(self, key: CopyKey) -> bool:
        """Note the end of a copy; return False when none of this name runs."""
        if key not in self._running:
            return False
        self._running.remove(key)
        return True

    def is_running(self, key: CopyKey) -> bool:
        """True while the copy is under way."""
        return key in self._running

    def withdraw(self, key: CopyKey) -> bool:
        """Take a waiting copy out of the queue; return False when it does not wait."""
        waiting = next((copy for copy in self._waiting if (copy.request_id, copy.epoch) == key), None)
        if waiting is None:
            return False
        self._waiting.remove(waiting)
        return True
