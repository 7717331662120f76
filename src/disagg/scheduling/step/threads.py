"""How many threads a step gets: those of its instance, and others on cores that neighbours lend.

Decided here is how many cores a step may borrow at all. Which of them are to be had, whoever computes sees from moment
to moment: a core is borrowed while its owner has no step, and given back before the next piece of work once it has one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from disagg.costs.latency import StepShape
from disagg.scheduling.step.actions import Chunk

_PREFILL_EFFICIENCY: Final = 0.9
"""What a second of a borrowed core spares a step: two threads prefill 1.9 times as fast as one (docs/engine.md)."""
_DECODE_EFFICIENCY: Final = 0.5
"""The same of decodes alone, which wait for memory: with two threads 1.3 times as fast alone, 1.7 times in batches."""


@dataclass(frozen=True, slots=True)
class StepThreads:
    """The threads of one instance, each on a core of its own, and how many cores of others it may borrow."""

    num_own: int = 1
    num_borrowable: int = 0

    def num_borrowed(self, chunks: Sequence[Chunk]) -> int:
        """Return how many cores of others a step may use: all, as a core without a step is of no other use."""
        return self.num_borrowable if chunks else 0

    def alone_s(self, shape: StepShape, duration_s: float, borrowed_s: float) -> float:
        """Return what a step would have taken on the instance's own cores; it took so long, so much of others' time."""
        return duration_s + _efficiency(has_prefill=shape.num_prefills > 0) * borrowed_s / self.num_own

    def speed(self, num_borrowed: float, *, has_prefill: bool) -> float:
        """Return how many times as fast as on the own cores a step is with so many of others all the while."""
        return 1 + _efficiency(has_prefill=has_prefill) * num_borrowed / self.num_own


ONE_THREAD: Final = StepThreads()


def _efficiency(*, has_prefill: bool) -> float:
    return _PREFILL_EFFICIENCY if has_prefill else _DECODE_EFFICIENCY
