"""As many requests of a trace as a search wants at a rate, from a place in it that a seed chooses."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Final

from disagg.measure.lengths import DrawnLengths
from disagg.measure.open_loop import FixedLengths, OpenLoop, RequestSource
from disagg.measure.workload import PrefixBlocks, RequestSpec

MOST_ROWS: Final = 20_000
"""Of a trace that are kept in memory."""
_LAP: Final = 1 << 48
"""Between the names of prefix blocks of one lap through the rows and the next: laps share no prefix."""


@dataclass(frozen=True, slots=True)
class TraceWindow:
    """``num_requests`` consecutive rows, from one that the seed chooses; after the last comes the first again.

    See ``open_loop.RequestSource``. ``rate`` is that of all rows, to which every window is stretched.
    """

    name: str
    kept: tuple[RequestSpec, ...]
    rate: float
    num_requests: int

    def __len__(self) -> int:
        return self.num_requests

    def rows(self, seed: int) -> Iterator[RequestSpec]:
        """Yield the rows; where they have times, those begin at 0 and are stretched to ``rate``, bursts and all."""
        start = random.Random(f"window {seed}").randrange(len(self.kept))
        chosen = [divmod(number, len(self.kept)) for number in range(start, start + self.num_requests)]
        # One lap and the gap before the next take as long as the rows' own rate says.
        lap_s = len(self.kept) / self.rate if math.isfinite(self.rate) else 0.0
        times = [self.kept[index].arrival_s + lap * lap_s for lap, index in chosen]
        span_s = times[-1] - times[0]
        factor = (self.num_requests - 1) / (span_s * self.rate) if span_s > 0 and math.isfinite(self.rate) else 1.0
        for (lap, index), time_s in zip(chosen, times, strict=True):
            row = self.kept[index]
            # Without its line: a row that comes again is another request.
            yield replace(row, arrival_s=(time_s - times[0]) * factor, prefix=_renamed(row.prefix, lap), line=0)


def keep_rows(workload: OpenLoop) -> OpenLoop:
    """Return the workload with the first rows of a trace in memory, so that each run need not read the file."""
    source = workload.source
    if isinstance(source, DrawnLengths | FixedLengths | TraceWindow):
        return workload
    rows = tuple(islice(source.rows(0), MOST_ROWS))
    return replace(workload, source=TraceWindow(source.name, rows, _rate(rows, source), len(rows)))


def with_requests(workload: OpenLoop, num_requests: int) -> OpenLoop:
    """Return a workload, of which ``keep_rows`` has kept the rows, with so many requests."""
    source = workload.source
    if isinstance(source, StretchedPrompts):
        return replace(workload, source=replace(source, source=replace(source.source, num_requests=num_requests)))
    assert isinstance(source, DrawnLengths | FixedLengths | TraceWindow), "keep_rows leaves no other"
    return replace(workload, source=replace(source, num_requests=num_requests))


@dataclass(frozen=True, slots=True)
class StretchedPrompts:
    """The requests of a source with prompts ``factor`` times as long. See ``open_loop.RequestSource``."""

    source: DrawnLengths | FixedLengths | TraceWindow
    factor: float

    @property
    def name(self) -> str:
        """The source's, and the factor."""
        return f"{self.source.name}, prompts x {self.factor:g}"

    @property
    def rate(self) -> float:
        """The source's."""
        return self.source.rate

    def __len__(self) -> int:
        return len(self.source)

    def rows(self, seed: int) -> Iterator[RequestSpec]:
        """Yield the requests; their prefixes are longer as well."""
        for row in self.source.rows(seed):
            tokens = max(1, round(row.prefix.block_tokens * self.factor))
            prefix = replace(row.prefix, block_tokens=tokens)
            yield replace(row, prompt_len=max(1, round(row.prompt_len * self.factor)), prefix=prefix)


def with_prompts(workload: OpenLoop, factor: float) -> OpenLoop:
    """Return a workload, of which ``keep_rows`` has kept the rows, with prompts ``factor`` times as long."""
    source = workload.source
    assert isinstance(source, DrawnLengths | FixedLengths | TraceWindow), "keep_rows leaves no other"
    return replace(workload, source=StretchedPrompts(source, factor))


def _rate(rows: Sequence[RequestSpec], source: RequestSource) -> float:
    if not math.isfinite(source.rate):
        return source.rate
    span_s = rows[-1].arrival_s - rows[0].arrival_s
    return (len(rows) - 1) / span_s if span_s > 0 else source.rate


def _renamed(prefix: PrefixBlocks, lap: int) -> PrefixBlocks:
    if not lap or not prefix.ids:
        return prefix
    return replace(prefix, ids=tuple(block + lap * _LAP for block in prefix.ids))
