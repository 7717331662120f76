"""Virtual time: a heap of things to come, in one total order, and a clock that jumps to the next of them.

What is due earlier comes first, then what was pushed first; turns, in which schedulers decide, come after everything
that happens at their time. Nothing else decides, so equal inputs give equal runs.
"""

from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush

from disagg.base.errors import InternalError


class EventQueue:
    """A heap of calls, those of schedulers that decide now, and the time of the one that runs. It is a ``Clock``."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._turns: deque[Callable[[], None]] = deque()
        self._now = 0.0
        self._num_pushed = 0
        self._num_run = 0

    @property
    def num_run(self) -> int:
        """Calls made so far."""
        return self._num_run

    def __len__(self) -> int:
        return len(self._heap) + len(self._turns)

    def now(self) -> float:
        """Return the time of the call that runs, in seconds from the start of the simulation."""
        return self._now

    def push(self, time_s: float, call: Callable[[], None]) -> None:
        """Make a call at ``time_s``. Raise InternalError when that is in the past or not a number."""
        if not time_s >= self._now:
            raise InternalError(f"an event for {time_s!r} s was pushed at {self._now!r} s")
        self._num_pushed += 1
        heappush(self._heap, (time_s, self._num_pushed, call))

    def push_turn(self, call: Callable[[], None]) -> None:
        """Make a call, in which a scheduler decides, once everything that is due by now has happened."""
        self._turns.append(call)

    def run(self, until_s: float = float("inf")) -> None:
        """Make the calls in order until none is due up to ``until_s``."""
        heap, turns, now = self._heap, self._turns, self._now
        while True:
            if turns and not (heap and heap[0][0] <= now):
                call = turns.popleft()
            elif heap and heap[0][0] <= until_s:
                now, _, call = heappop(heap)
                self._now = now
            else:
                return
            self._num_run += 1
            call()
