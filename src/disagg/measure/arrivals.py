"""When requests arrive: as a trace says, stretched to a rate, or drawn from a renewal process."""

import enum
import heapq
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from disagg.base.errors import ConfigurationError
from disagg.measure.workload import RequestSpec

MOONCAKE_BATCH_S: Final = 3.0
"""Mooncake's traces round arrival times down to batches of 3 s."""


class ArrivalKind(enum.Enum):
    """Where arrival times come from."""

    REPLAY = "replay"
    """The trace's own times, stretched."""
    POISSON = "poisson"
    """Exponential gaps: many independent users."""
    GAMMA = "gamma"
    """Gamma gaps with a chosen coefficient of variation: above 1 burstier than Poisson, below 1 steadier."""


@dataclass(frozen=True, slots=True)
class Arrivals:
    """How to time the requests of a workload. ``rate`` in requests/s; None keeps the trace's own."""

    kind: ArrivalKind = ArrivalKind.REPLAY
    rate: float | None = None
    gap_cv: float = 1.0
    """Coefficient of variation of the gaps, for GAMMA."""
    batch_s: float = 0.0
    """Times of a replayed trace are rounded down to multiples of this; they are spread again, uniformly."""

    def __post_init__(self) -> None:
        if self.rate is not None and not 0 < self.rate < math.inf:
            raise ConfigurationError(f"an arrival rate of {self.rate} requests/s cannot be: give one above 0")
        if self.kind is not ArrivalKind.REPLAY and self.rate is None:
            raise ConfigurationError(f"{self.kind.value} arrivals need a rate: give --rate")
        if not self.gap_cv > 0:
            raise ConfigurationError(f"gaps with a coefficient of variation of {self.gap_cv} cannot be: above 0")

    def time(self, rows: Iterable[RequestSpec], trace_rate: float, seed: int) -> Iterator[RequestSpec]:
        """Yield ``rows`` in order of arrival with their times. ``trace_rate`` is the mean rate of a timed trace.

        Raises ConfigurationError when a replay is asked of rows without times.
        """
        rng = random.Random(seed)
        if self.kind is ArrivalKind.REPLAY:
            yield from self._replay(rows, trace_rate, rng)
            return
        assert self.rate is not None, "checked above"
        now_s = 0.0
        for row in rows:
            now_s += self._draw_gap(rng, self.rate)
            yield replace(row, arrival_s=now_s)

    def _draw_gap(self, rng: random.Random, rate: float) -> float:
        if self.kind is ArrivalKind.POISSON:
            return rng.expovariate(rate)
        shape = 1 / self.gap_cv**2
        return rng.gammavariate(shape, 1 / (rate * shape))

    def _replay(self, rows: Iterable[RequestSpec], trace_rate: float, rng: random.Random) -> Iterator[RequestSpec]:
        if math.isnan(trace_rate):
            raise ConfigurationError("the trace gives lengths but no arrival times: give --rate")
        factor = 1.0 if self.rate is None or math.isinf(trace_rate) else trace_rate / self.rate
        for row in _spread(rows, self.batch_s, rng) if self.batch_s else rows:
            yield replace(row, arrival_s=row.arrival_s * factor)


def _spread(rows: Iterable[RequestSpec], batch_s: float, rng: random.Random) -> Iterator[RequestSpec]:
    """Add to each time a uniform part of the batch's length, and put the rows in order again.

    A row that is still held can only be overtaken by rows of times within ``batch_s`` of its own.
    """
    held: list[tuple[float, int, RequestSpec]] = []
    for number, row in enumerate(rows):
        while held and held[0][0] < row.arrival_s:
            yield heapq.heappop(held)[2]
        moment = row.arrival_s + rng.uniform(0, batch_s)
        heapq.heappush(held, (moment, number, replace(row, arrival_s=moment)))
    while held:
        yield heapq.heappop(held)[2]
