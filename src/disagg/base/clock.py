"""Time, as something handed in: policy code never reads a clock itself."""

import time
from typing import Protocol


class Clock(Protocol):
    """Monotonic time in seconds. On one host all processes share its zero."""

    def now(self) -> float:
        """Return seconds since an arbitrary, fixed moment."""


class MonotonicClock:
    """The machine's monotonic clock (CLOCK_MONOTONIC: shared by all processes of a host)."""

    def now(self) -> float:
        """Return seconds since boot."""
        return time.monotonic()
