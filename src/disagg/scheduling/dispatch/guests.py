"""For whom room is kept: tenants that ask for no more than their share, beside one that asks for more. Pure.

A tenant presses while it has more under way than its share among those who are there, one who was there a moment ago
counted as well. It is held back where a prompt like the longest that others asked for lately would be refused: so
others find the server as if nobody pressed.
"""

import math
from dataclasses import dataclass
from typing import Final

from disagg.base.ids import Epoch, RequestId
from disagg.scheduling.dispatch.state import SequenceEntry

_EXPECTED_FOR_S: Final = 20.0
"""Seconds for which somebody who was there is expected to come again."""
_MEMORY_S: Final = 300.0
"""In which a long prompt is forgotten."""
_MOST_TENANTS: Final = 8
"""Those that were there last are remembered."""
_LAST: Final = 1 << 62


@dataclass(slots=True)
class _Guest:
    longest: SequenceEntry
    seen_s: float

    def tokens(self, now: float) -> float:
        return self.longest.num_tokens * math.exp(-max(0.0, now - self.longest.arrived_s) / _MEMORY_S)


class Guests:
    """What was admitted of tenants that did not press."""

    def __init__(self) -> None:
        self._known: dict[str, _Guest] = {}

    def admitted(self, sequence: SequenceEntry, now: float) -> None:
        """Take account of a sequence of such a tenant that is predicted to keep its objectives."""
        known = self._known.pop(sequence.tenant, None)
        if known is None or known.tokens(now) <= sequence.num_tokens:
            known = _Guest(sequence, now)
        known.seen_s = now
        self._known[sequence.tenant] = known
        if len(self._known) > _MOST_TENANTS:
            del self._known[next(iter(self._known))]

    def expected(self, beside: SequenceEntry, now: float) -> SequenceEntry | None:
        """Return the longest of what other tenants may ask for, as if it arrived now; None without any.

        Of those that are served before ``beside``, or as early, by their priority.
        """
        others = [
            one
            for name, one in self._known.items()
            if name != beside.tenant and one.longest.priority <= beside.priority and now <= one.seen_s + _EXPECTED_FOR_S
        ]
        if not others:
            return None
        guest = max(others, key=lambda one: one.tokens(now))
        longest, num_tokens = guest.longest, max(1, int(guest.tokens(now)))
        return SequenceEntry(
            request_id=RequestId("a guest"),
            epoch=Epoch(0),
            num_tokens=num_tokens,
            max_total_tokens=num_tokens + longest.max_total_tokens - longest.num_tokens,
            priority=longest.priority,
            order=_LAST,
            arrived_s=now,
            deadline_s=math.inf,
            tenant=longest.tenant,
            objectives=longest.objectives,
        )
