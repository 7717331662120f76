"""When requests arrive: as a trace says, stretched to a rate, or drawn from a renewal process."""

import enum
import heapq
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from disagg.base.errors import ConfigurationError
from disagg.measure.trace_rows import LATEST_S
from disagg.measure.workload import RequestSpec

MOONCAKE_BATCH_S: Final = 3.0
"""Mooncake's traces round arrival times down to batches of 3 s."""
GAP_CVS: Final = (0.001, 1000.0)
"""Coefficients of variation between which gamma gaps can be drawn."""


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
        least, most = GAP_CVS
        if not least <= self.gap_cv <= most:
            raise ConfigurationError(
                f"gaps with a coefficient of variation of {self.gap_cv} cannot be: from {least} to {most:g}"
            )
        if not 0 <= self.batch_s <= LATEST_S:
            raise ConfigurationError(f"batches of {self.batch_s} s cannot be: from 0 to {LATEST_S:g} s")

    def time(self, rows: Iterable[RequestSpec], trace_rate: float, seed: int) -> Iterator[RequestSpec]:
        """Yield ``rows`` in order of arrival with their times. ``trace_rate`` is the mean rate of a timed trace.

        Raises ConfigurationError when a replay is asked of rows without times, or the rate is so low that the last
        request would come after ``LATEST_S``.
        """
        rng = random.Random(seed)
        timed = self._replay(rows, trace_rate, rng) if self.kind is ArrivalKind.REPLAY else self._draw(rows, rng)
        for row in timed:
            if not row.arrival_s <= LATEST_S:
                raise ConfigurationError(
                    f"at {self.rate} requests/s they come after {LATEST_S:g} s: give a higher rate"
                )
            yield row

    def _draw(self, rows: Iterable[RequestSpec], rng: random.Random) -> Iterator[RequestSpec]:
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
