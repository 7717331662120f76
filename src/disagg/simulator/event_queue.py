"""Virtual time: a heap of things to come, in one total order, and a clock that jumps to the next of them.

The order is ``(time, priority, sequence number)``: what is due earlier comes first, then what has the smaller
priority, then what was pushed first. Nothing else decides, so equal inputs give equal runs.
"""

import enum
import heapq
from collections.abc import Callable
from typing import Final

from disagg.base.errors import InternalError


class Priority(enum.IntEnum):
    """What goes first among things that are due at the same time."""

    HAPPENING = 0
    """Something ended, arrived or came due."""
    TURN = 1
    """A scheduler decides: after everything that has happened up to this moment."""


_HAPPENING: Final = int(Priority.HAPPENING)


class EventQueue:
    """A heap of calls, and the time of the one that runs. It is a ``Clock``."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, int, Callable[[], None]]] = []
        self._now = 0.0
        self._num_pushed = 0
        self._num_run = 0

    @property
    def num_run(self) -> int:
        """Calls made so far."""
        return self._num_run

    def __len__(self) -> int:
        return len(self._heap)

    def now(self) -> float:
        """Return the time of the call that runs, in seconds from the start of the simulation."""
        return self._now

    def push(self, time_s: float, call: Callable[[], None], priority: int = _HAPPENING) -> None:
        """Make a call at ``time_s``. Raise InternalError when that is in the past or not a number."""
        if not time_s >= self._now:
            raise InternalError(f"an event for {time_s!r} s was pushed at {self._now!r} s")
        self._num_pushed += 1
        heapq.heappush(self._heap, (time_s, priority, self._num_pushed, call))

    def run(self, until_s: float = float("inf")) -> None:
        """Make the calls in order until none is due up to ``until_s``."""
        heap = self._heap
        while heap and heap[0][0] <= until_s:
            self._now, _, _, call = heapq.heappop(heap)
            self._num_run += 1
            call()
