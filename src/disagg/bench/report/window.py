"""Which part of a run to look at closely, and how requests share lanes there. Pure functions over records."""

import heapq
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from disagg.measure.record import RequestRecord
from disagg.measure.slo import Slo

_GAPS_SHOWN: Final = 200
"""A window is about so many typical gaps long, so that a tick for each token can be told from the next."""
_MEDIAN_FACTOR: Final = 5.0
_NICE: Final = (1.0, 2.0, 5.0)


@dataclass(frozen=True, slots=True)
class Window:
    """A part of a run, in seconds since its start."""

    start_s: float
    length_s: float

    @property
    def end_s(self) -> float:
        """Its end."""
        return self.start_s + self.length_s

    def overlaps(self, start_s: float, end_s: float) -> bool:
        """Return whether some of ``start_s`` to ``end_s`` lies inside."""
        return start_s < self.end_s and end_s > self.start_s


@dataclass(frozen=True, slots=True)
class Gap:
    """The time between two events of one answer, in seconds since the start of the run."""

    start_s: float
    end_s: float

    @property
    def length_s(self) -> float:
        """How long a reader waited."""
        return self.end_s - self.start_s


def stall_threshold_s(slo: Slo, records: Iterable[RequestRecord]) -> float:
    """Return the length from which a gap is a stall: the TPOT objective, or without one 5 times the median gap."""
    if np.isfinite(slo.tpot_s):
        return slo.tpot_s
    gaps = [gap for record in records for gap in record.gaps_s]
    return _MEDIAN_FACTOR * statistics.median(gaps) if gaps else float("inf")


def stalls(record: RequestRecord, threshold_s: float) -> list[Gap]:
    """Return the gaps of an answer that are longer than ``threshold_s``."""
    pairs = zip(record.event_s, record.event_s[1:], strict=False)
    return [Gap(before, after) for before, after in pairs if after - before > threshold_s]


def window_length_s(gaps_s: Sequence[float], span_s: float) -> float:
    """Return a round length in which single tokens can be seen, at most ``span_s``."""
    if not gaps_s:
        return span_s
    wanted_s = _GAPS_SHOWN * statistics.median(gaps_s)
    if wanted_s <= 0:
        return span_s
    power = 10.0 ** np.floor(np.log10(wanted_s))
    return min(float(power * max(digit for digit in _NICE if digit * power <= wanted_s)), span_s)


def choose_window(records: Sequence[RequestRecord], threshold_s: float, length_s: float) -> Window:
    """Return the window of ``length_s`` in which all answers together spend most time in stalls.

    Windows start a tenth of their length apart. Without any stall, the one with most events.
    """
    end_s = max((record.event_s[-1] for record in records if record.event_s), default=0.0)
    starts = np.arange(0.0, max(end_s - length_s, 0.0) + length_s / 10, length_s / 10)
    found = [gap for record in records for gap in stalls(record, threshold_s)]
    if found:
        begins = np.array([gap.start_s for gap in found])
        ends = np.array([gap.end_s for gap in found])
        scores = [float(np.clip(np.minimum(ends, s + length_s) - np.maximum(begins, s), 0, None).sum()) for s in starts]
    else:
        times = np.sort(np.array([moment for record in records for moment in record.event_s]))
        scores = [float(np.searchsorted(times, s + length_s) - np.searchsorted(times, s)) for s in starts]
    return Window(float(starts[int(np.argmax(scores))]), length_s)


def stalled_share(records: Iterable[RequestRecord], threshold_s: float, window: Window) -> float:
    """Return the share of all answering time within ``window`` that lies in stalls; 0 when nothing answers."""
    answering_s = stalled_s = 0.0
    for record in records:
        if record.event_s:
            answering_s += _shared_s(window, record.event_s[0], record.event_s[-1])
            stalled_s += sum(_shared_s(window, gap.start_s, gap.end_s) for gap in stalls(record, threshold_s))
    return stalled_s / answering_s if answering_s > 0 else 0.0


def pack_lanes(spans: Sequence[tuple[float, float]]) -> list[int]:
    """Return a lane for each span (start, end) so that spans of one lane do not overlap; the fewest lanes there can be.

    In order of start, each span takes the first lane that is free.
    """
    lanes = [0] * len(spans)
    busy: list[tuple[float, int]] = []
    free: list[int] = []
    num_lanes = 0
    for index in sorted(range(len(spans)), key=lambda index: spans[index]):
        start, end = spans[index]
        while busy and busy[0][0] <= start:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if free:
            lane = heapq.heappop(free)
        else:
            lane = num_lanes
            num_lanes += 1
        lanes[index] = lane
        heapq.heappush(busy, (end, lane))
    return lanes


def _shared_s(window: Window, start_s: float, end_s: float) -> float:
    return max(0.0, min(end_s, window.end_s) - max(start_s, window.start_s))
