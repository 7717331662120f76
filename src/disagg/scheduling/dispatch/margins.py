"""How far what was predicted of admitted sequences was off, and the margin that admission keeps from objectives. Pure.

First tokens come some factor later or sooner than predicted. While more come than can be served, all that are admitted
are at the edge of their objective, so the mean of the factor is not enough: nineteen in twenty stay below the margin.
Gaps between tokens are filled with prompts up to the objective, so nothing is learned from how long they were: the
margin grows when an answer was too slow, and shrinks as others keep theirs.
"""

import math
from dataclasses import dataclass
from typing import Final

_LEAST: Final = 1 / 0.9
"""Margin of first tokens: no prediction is trusted further."""
_PRIOR_ERROR: Final = 0.15
_PRIOR_WEIGHT: Final = 8.0
_MEMORY: Final = 32.0
"""Sequences that count."""
_MOST_OF_THEM: Final = 1.64
"""Deviations from the mean below which they stay."""
_MOST_ERROR: Final = math.log(4.0)
_WEIGHTY: Final = 0.5
"""Part of an objective from which a first token counts wholly: short waits say little of long ones."""
_SHORTEST_S: Final = 1e-3
_STEP_UP: Final = 1.1
_STEP_DOWN: Final = 0.995
_MOST_TPOT: Final = 2.0


@dataclass(frozen=True, slots=True)
class Margin:
    """How many times what is predicted has to keep the objectives."""

    ttft: float
    tpot: float


OF_GUESTS: Final = Margin(1.03, 1.0)
"""Of sequences for which room is kept."""
BEHIND_PROMPTS: Final = Margin(1.15, 1.0)
"""Of sequences that nobody waits before, and that are served behind others' prompts: how far those are is not told."""
FOR_GUESTS: Final = Margin(1.4, 1.0)
"""Of room that is kept: what takes it comes a moment later, with whatever else has come meanwhile."""


class Margins:
    """Learns the margin from what came of those that were admitted."""

    def __init__(self) -> None:
        # Mean and variance of the logarithm of what came over what was predicted.
        self._weight = _PRIOR_WEIGHT
        self._mean, self._variance = 0.0, _PRIOR_ERROR**2
        self._tpot = 1.0
        self._grown_s = -math.inf

    @property
    def margin(self) -> Margin:
        """The margin that admission keeps now."""
        ttft = math.exp(self._mean + _MOST_OF_THEM * math.sqrt(self._variance))
        return Margin(max(_LEAST, ttft), self._tpot)

    def first_token(self, predicted_s: float, came_s: float, objective_s: float) -> None:
        """Learn from a first token that came ``came_s`` after the arrival."""
        error = math.log(max(came_s, _SHORTEST_S) / max(predicted_s, _SHORTEST_S))
        error = max(-_MOST_ERROR, min(_MOST_ERROR, error))
        weight = min(1.0, max(predicted_s, came_s) / (_WEIGHTY * objective_s))
        self._weight = min(self._weight + weight, _MEMORY)
        share, off = weight / self._weight, error - self._mean
        self._mean += share * off
        self._variance += share * (off * (error - self._mean) - self._variance)

    def answer_ended(self, arrived_s: float, ended_s: float, *, is_kept: bool) -> None:
        """Learn whether an answer kept its TPOT objective.

        One that was admitted before the margin grew last says nothing of what that has brought.
        """
        if is_kept:
            self._tpot = max(1.0, _STEP_DOWN * self._tpot)
        elif arrived_s > self._grown_s:
            self._tpot, self._grown_s = min(_MOST_TPOT, _STEP_UP * self._tpot), ended_s
