"""The highest rate that still keeps a target: doubling until it is bracketed, then halving the bracket. Pure."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

RATE_TOLERANCE: Final = 0.02
MAX_DOUBLINGS: Final = 20
_LARGEST_STEP: Final = 2.0


@dataclass(frozen=True, slots=True)
class RateBracket:
    """The goodput lies between ``met``, the highest rate that kept the target, and ``missed``, the lowest that did not.

    ``met`` is 0 when every rate missed, ``missed`` infinite when every rate met.
    """

    met: float
    missed: float

    @property
    def is_closed(self) -> bool:
        """Whether some rate met and some missed."""
        return self.met > 0 and self.missed < math.inf

    def is_within(self, tolerance: float) -> bool:
        """Whether both ends are as near as a part ``tolerance`` of the lower one."""
        return self.missed - self.met <= tolerance * self.met


def bracket_goodput(
    meets: Callable[[float], bool],
    start_rate: float,
    *,
    tolerance: float = RATE_TOLERANCE,
    max_doublings: int = MAX_DOUBLINGS,
    growth: float = 2.0,
) -> RateBracket:
    """Return the rates between which the goodput lies, as near as ``tolerance``, or open where all rates met or missed.

    ``meets(rate)`` is asked at most once for a rate and taken to be true below some rate and false above. From
    ``start_rate`` the rate is doubled or halved up to ``max_doublings`` times, or, where the start is a good guess,
    changed by the factor ``growth`` and then by its square each time, up to 2; then the bracket is halved.
    """
    bracket = RateBracket(0.0, math.inf)
    rate = start_rate
    for _ in range(max_doublings):
        if meets(rate):
            bracket, rate = RateBracket(rate, bracket.missed), rate * growth
        else:
            bracket, rate = RateBracket(bracket.met, rate), rate / growth
        if bracket.is_closed:
            break
        growth = max(growth, min(growth**2, _LARGEST_STEP))
    while bracket.is_closed and not bracket.is_within(tolerance):
        middle = (bracket.met + bracket.missed) / 2
        bracket = RateBracket(middle, bracket.missed) if meets(middle) else RateBracket(bracket.met, middle)
    return bracket
