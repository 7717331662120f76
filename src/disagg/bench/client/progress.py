"""How a run is going, for whoever watches it."""

import math
from collections import deque
from dataclasses import dataclass
from typing import Final

from disagg.measure.record import Ending, RequestRecord
from disagg.measure.slo import Slo
from disagg.measure.statistics import Percentiles

_ROLLING: Final = 50
"""Requests over which rolling figures are taken."""


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """A look at a run under way. The medians are of the latest requests that finished; NaN before any did."""

    elapsed_s: float
    num_requests: int
    num_sent: int
    num_finished: int
    num_failed: int
    ttft_s: float
    tpot_s: float
    request_rate: float
    """Finished requests/s lately."""
    output_tokens_per_s: float

    @property
    def num_running(self) -> int:
        """Requests under way."""
        return self.num_sent - self.num_finished - self.num_failed


class Tally:
    """Counts while a run goes on: for those who watch, and for the rules that end it."""

    def __init__(self, num_requests: int, slo: Slo) -> None:
        self.num_requests = num_requests
        self.num_sent = 0
        self.num_finished = 0
        self.num_missed = 0
        self._num_failed = 0
        self._slo = slo
        self._latest: deque[RequestRecord] = deque(maxlen=_ROLLING)

    @property
    def num_outstanding(self) -> int:
        """Requests under way."""
        return self.num_sent - self.num_finished - self._num_failed

    def add(self, record: RequestRecord) -> None:
        """Count a request that ended."""
        if record.ending is Ending.FINISHED:
            self.num_finished += 1
            self._latest.append(record)
        else:
            self._num_failed += 1
        self.num_missed += not record.meets(self._slo)

    def look(self, elapsed_s: float) -> LoadProgress:
        """Return how far the run is."""
        latest = self._latest
        since_s = latest[0].finished_s if len(latest) == _ROLLING else 0.0
        span_s = elapsed_s - since_s
        return LoadProgress(
            elapsed_s=elapsed_s,
            num_requests=self.num_requests,
            num_sent=self.num_sent,
            num_finished=self.num_finished,
            num_failed=self._num_failed,
            ttft_s=Percentiles.of([record.ttft_s for record in latest]).p50,
            tpot_s=Percentiles.of([record.tpot_s for record in latest]).p50,
            request_rate=len(latest) / span_s if span_s > 0 else math.nan,
            output_tokens_per_s=sum(record.num_output_tokens for record in latest) / span_s if span_s > 0 else math.nan,
        )
