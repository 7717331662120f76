"""A step that goes faster while it borrows cores: its pace is constant between changes of their number."""

from collections.abc import Mapping
from typing import Final

_WHOLE: Final = 1.0


class BorrowingStep:
    """One step in flight. Pure.

    ``times_s`` are what the whole step takes, by the number of cores that it borrows; 0 is among them. A number that is
    not counts as the next smaller one, and no core makes a step slower. Half a step at one pace and half at another
    take half of either's time.
    """

    def __init__(self, times_s: Mapping[int, float], now: float, num_borrowed: int = 0) -> None:
        self.started_s = now
        self.borrowed_s = 0.0
        """What others' cores computed so far, in seconds of one core."""
        self._times_s = times_s
        self._left = _WHOLE
        self._since_s = now
        self._num_borrowed = num_borrowed
        self.end_s = now + self._time_s()
        """When it ends, if nothing changes."""

    def change(self, now: float, num_borrowed: int) -> None:
        """Go on with so many cores of others."""
        self._advance(now)
        self._num_borrowed = num_borrowed
        self.end_s = now + self._left * self._time_s()

    def finish(self) -> None:
        """End now, at ``end_s``."""
        self._advance(self.end_s)

    def _advance(self, now: float) -> None:
        passed_s = now - self._since_s
        self.borrowed_s += passed_s * self._num_borrowed
        self._left = max(0.0, self._left - passed_s / self._time_s())
        self._since_s = now

    def _time_s(self) -> float:
        alone_s = self._times_s[0]
        known = max(number for number in self._times_s if number <= self._num_borrowed)
        return min(alone_s, self._times_s[known])
