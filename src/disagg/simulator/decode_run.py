"""A run of equal decode steps, timed ahead: nothing happens between them that the scheduler would have to decide."""

from bisect import bisect_left
from dataclasses import replace
from itertools import accumulate
from typing import Final

from disagg.costs.latency import LatencyModel, PredictsRuns, StepShape
from disagg.scheduling.step.actions import RunStep

FIRST_STEPS: Final = 8
"""Timed at once; twice as many each time the run gets that far. What an interruption throws away was timed in vain."""
MOST_STEPS: Final = 64
"""Timed at once, however far a run gets."""


class DecodeRun:
    """The step in flight and its repetitions. ``ends_s`` are their ends, in order; the first is of the one in flight.

    The times are those that single steps would have had, to the last bit: the same additions in the same order.
    """

    def __init__(
        self,
        step: RunStep,
        shape: StepShape,
        latency: LatencyModel,
        now: float,
        num_repeats: int,
    ) -> None:
        self.step = step
        self.started_s = now
        """When the step in flight did."""
        self.ends_s: list[float] = []
        self.is_interrupted = False
        """It ends with the step in flight, whatever was planned."""
        self._shape = shape
        self._latency = latency
        self._time_s = now
        self._num_left = num_repeats + 1
        self._num_next = FIRST_STEPS
        self.extend()

    @property
    def is_complete(self) -> bool:
        """True when all repetitions have been timed."""
        return not self._num_left

    def extend(self) -> None:
        """Time further steps."""
        count = min(self._num_next, self._num_left)
        self._num_left -= count
        self._num_next = min(2 * self._num_next, MOST_STEPS)
        shape, latency = self._shape, self._latency
        if latency.num_stages == 1 and isinstance(latency, PredictsRuns):
            ends_s = list(accumulate(latency.decode_run_s(shape, count), initial=self._time_s))
            self.ends_s += ends_s[1:]
            shape.decode_context += count * shape.num_decodes
        else:
            self._step_through(count)
        self._time_s = self.ends_s[-1]

    def _step_through(self, count: int) -> None:
        shape, time_s, num_decodes = self._shape, self._time_s, self._shape.num_decodes
        stage_times_s, add = self._latency.stage_times_s, self.ends_s.append
        is_pipeline = self._latency.num_stages > 1
        for _ in range(count):
            if is_pipeline:
                for duration_s in stage_times_s(shape):
                    time_s += duration_s
            else:
                time_s += stage_times_s(shape)[0]
            add(time_s)
            shape.decode_context += num_decodes

    def goes_on(self, step: RunStep, latency: LatencyModel, num_repeats: int, now: float) -> bool:
        """Go on with a step that repeats the last one ``now``, where what was timed ahead still holds."""
        is_same = bool(step.num_standing) and not step.chunks and latency is self._latency and now == self.started_s
        if not (is_same and self.ends_s and num_repeats == self._num_left + len(self.ends_s) - 1):
            return False
        self.step, self.is_interrupted = step, False
        return True

    def is_last(self, count: int) -> bool:
        """True when no step is left after the next ``count``: the last one may end a sequence."""
        return not self._num_left and count == len(self.ends_s)

    def num_ended(self, now: float) -> int:
        """Return how many steps ended before ``now``; one that ends at this very moment still counts as in flight."""
        return bisect_left(self.ends_s, now)

    def shape_in_flight(self) -> StepShape:
        """Return the shape of the step in flight."""
        return replace(
            self._shape, decode_context=self._shape.decode_context - len(self.ends_s) * self._shape.num_decodes
        )

    def take(self, count: int) -> list[float]:
        """Remove the next ``count`` steps, which have ended; return their ends."""
        taken = self.ends_s[:count]
        del self.ends_s[:count]
        self.started_s = taken[-1] if taken else self.started_s
        return taken
