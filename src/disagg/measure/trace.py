"""A trace file, read as often as its requests are wanted, so that memory does not grow with its length."""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from disagg.base.errors import ConfigurationError
from disagg.measure.trace_rows import read_rows
from disagg.measure.workload import RequestSpec


class Trace:
    """The requests of one file, or ``num_requests`` of them, from the one at ``first`` on. Times count from that one.

    Those with an answer longer than ``longest_answer`` are left out.
    """

    def __init__(
        self, path: Path, num_requests: int | None = None, *, first: int = 0, longest_answer: int | None = None
    ) -> None:
        """Read the file once; raise ConfigurationError, with the line, when it is no trace or out of order."""
        self._path = path
        self._begin, self._end = first, None if num_requests is None else first + num_requests
        self._longest_answer = math.inf if longest_answer is None else longest_answer
        self._count = 0
        self._first_s = self._last_s = math.nan
        latest_s = -math.inf
        for row in self._read():
            if self._count == 0:
                self._first_s = row.arrival_s
            if math.isnan(row.arrival_s) != math.isnan(self._first_s):
                raise ConfigurationError(
                    f"{path}, line {row.line}: either every request has a time or none has: complete the file"
                )
            if self.has_times:
                if row.arrival_s < latest_s:
                    raise ConfigurationError(
                        f"{path}, line {row.line}: arrival at {row.arrival_s} s is before that of the line before, "
                        f"{latest_s} s: sort the file, and give one run at a time"
                    )
                latest_s = row.arrival_s
            self._count += 1
        if not self._count:
            raise ConfigurationError(f"{path} holds no requests" + (f" from number {first} on" if first else ""))
        self._last_s = latest_s

    @property
    def name(self) -> str:
        """The file's name."""
        return self._path.name

    @property
    def has_times(self) -> bool:
        """True when the file says when its requests arrived."""
        return not math.isnan(self._first_s)

    @property
    def rate(self) -> float:
        """Mean arrival rate of the file in requests/s; NaN without times, infinite when all come at once."""
        if not self.has_times:
            return math.nan
        span_s = self._last_s - self._first_s
        return (self._count - 1) / span_s if span_s > 0 else math.inf

    def __len__(self) -> int:
        return self._count

    def rows(self, seed: int = 0) -> Iterator[RequestSpec]:
        """Yield the requests in the file's order, whatever the seed; the first arrives at 0 s."""
        for row in self._read():
            yield replace(row, arrival_s=row.arrival_s - self._first_s) if self.has_times else row

    def _read(self) -> Iterator[RequestSpec]:
        rows = (row for row in read_rows(self._path) if row.output_len <= self._longest_answer)
        return islice(rows, self._begin, self._end)
