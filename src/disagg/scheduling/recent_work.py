"""How much work came lately: a running mean in which older work counts less. Pure."""

import math
from dataclasses import dataclass
from typing import Final

_MEMORY_S: Final = 20.0
"""For which work that came is remembered."""


@dataclass(slots=True)
class RecentWork:
    """How much work came in a second, lately."""

    _work_s: float = 0.0
    _seen_s: float = -math.inf

    def add(self, work_s: float, now: float) -> None:
        """Take account of work that came now."""
        self._work_s = self._left(now) + work_s
        self._seen_s = now

    def share(self, now: float) -> float:
        """Return the seconds of work in a second."""
        return self._left(now) / _MEMORY_S

    def _left(self, now: float) -> float:
        return self._work_s * _MEMORY_S / (_MEMORY_S + max(0.0, now - self._seen_s)) if self._work_s else 0.0
