"""How many instances of a role there are to be: a rule with hysteresis and a cool-down. Pure.

One more is wanted when too few requests are predicted to keep their objectives, and that for a while; one fewer when
the others alone are predicted to keep them well, and that for longer. A removal that was regretted doubles the time for
which all must be well before the next one: a load that swings about a border costs fewer changes each time.
"""

import math
from collections.abc import Callable
from typing import Final

import msgspec

from disagg.base.elastic_settings import InstanceRange

TARGET: Final = 0.9
"""Part of the requests that can be in time at all: with fewer, instances are added."""
WELL: Final = 0.97
"""The same of the instances that would remain: with as many, one is removed."""
LOW_S: Final = 3.0
"""How long it has to be too few before one is added."""
CALM_S: Final = 60.0
"""How long it has to be enough before one is removed."""
MOST_CALM_S: Final = 3600.0
COOL_DOWN_S: Final = 15.0
"""From the moment when the last change has come true to the next."""

Attainment = Callable[[int], float]
"""What so many instances are predicted to keep, as a part of what any number could."""


class ScalingPolicy:
    """The rule for one role. Reviewed at regular times, every second or so."""

    def __init__(self, bounds: InstanceRange) -> None:
        self.bounds = bounds
        self.calm_s = CALM_S
        self._low_since_s = math.inf
        self._calm_since_s = math.inf
        self._rests_until_s = -math.inf
        self._has_removed = False

    def review(
        self,
        count: int,
        attainment: Attainment | None,
        now: float,
        *,
        is_behind: bool = False,
        is_settled: bool = True,
    ) -> int:
        """Return how many instances there are to be. None of an attainment: nothing can be predicted now.

        ``is_behind``: what waits already makes too many late. Unless it ``is_settled``, a change is still coming true.
        """
        if not is_settled:
            self._rests_until_s = now + COOL_DOWN_S
        self._watch(count, attainment, now, is_behind)
        if not is_settled or now < self._rests_until_s:
            return count
        wanted = min(max(self._wanted(count, attainment, now), self.bounds.fewest), self.bounds.most)
        if wanted != count:
            self._changed(wanted > count, now)
        return wanted

    def rest(self, now: float) -> None:
        """Decide nothing for a while."""
        self._low_since_s = self._calm_since_s = math.inf
        self._rests_until_s = now + COOL_DOWN_S

    def _watch(self, count: int, attainment: Attainment | None, now: float, is_behind: bool) -> None:
        """Note since when it has been too few, or more than enough, without a break."""
        is_low = attainment is not None and (is_behind or attainment(count) < TARGET)
        is_calm = (
            attainment is not None and not is_behind and count > self.bounds.fewest and attainment(count - 1) >= WELL
        )
        self._low_since_s = min(self._low_since_s, now) if is_low else math.inf
        self._calm_since_s = min(self._calm_since_s, now) if is_calm else math.inf

    def _wanted(self, count: int, attainment: Attainment | None, now: float) -> int:
        if attainment is not None and now >= self._low_since_s + LOW_S:
            enough = (number for number in range(count + 1, self.bounds.most) if attainment(number) >= TARGET)
            return next(enough, self.bounds.most)
        return count - 1 if now >= self._calm_since_s + self.calm_s else count

    def _changed(self, grew: bool, now: float) -> None:
        if grew and self._has_removed:
            self.calm_s = min(2 * self.calm_s, MOST_CALM_S)
        self._has_removed = not grew
        self.rest(now)


class ScalingView(msgspec.Struct, frozen=True, kw_only=True):
    """One role as it was seen at the last review. None of an attainment: nothing could be predicted."""

    role: str
    count: int
    fewest: int
    most: int
    attainment: float | None = None
    """Part of the requests predicted to keep their objectives with the instances there are."""
    attainment_with_fewer: float | None = None
    last_change: str = ""
    num_added: int = 0
    num_removed: int = 0
    """Instances, since the beginning."""
