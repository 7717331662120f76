"""A run of equal decode steps, timed ahead: nothing happens between them that the scheduler would have to decide."""

from bisect import bisect_left

from disagg.costs.latency import LatencyModel, StepShape
from disagg.scheduling.step.actions import RunStep


class DecodeRun:
    """The step in flight and its repetitions. ``ends_s`` are their ends, in order; the first is of the one in flight.

    The times are those that single steps would have had, to the last bit: the same additions in the same order.
    """

    def __init__(self, step: RunStep, shape: StepShape, latency: LatencyModel, now: float, num_repeats: int) -> None:
        self.step = step
        self.started_s = now
        """When the step in flight did."""
        self.ends_s: list[float] = []
        time_s = now
        for _ in range(num_repeats + 1):
            for duration_s in latency.stage_times_s(shape):
                time_s += duration_s
            self.ends_s.append(time_s)
            shape.decode_context += shape.num_decodes

    def num_ended(self, now: float) -> int:
        """Return how many steps ended before ``now``; one that ends at this very moment still counts as in flight."""
        return bisect_left(self.ends_s, now)

    def take(self, count: int) -> list[float]:
        """Remove the next ``count`` steps, which have ended; return their ends."""
        taken = self.ends_s[:count]
        del self.ends_s[:count]
        self.started_s = taken[-1] if taken else self.started_s
        return taken
