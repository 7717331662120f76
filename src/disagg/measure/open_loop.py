"""Open-loop workloads: requests arrive whatever becomes of those before them."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol

from disagg.base.errors import ConfigurationError
from disagg.measure.arrivals import ArrivalKind, Arrivals
from disagg.measure.workload import PrefixBlocks, RequestSpec


class RequestSource(Protocol):
    """Lengths, and arrival times where there are any: a trace, or fitted lengths to draw from."""

    @property
    def name(self) -> str:
        """For reports."""

    @property
    def rate(self) -> float:
        """Mean arrival rate in requests/s; NaN without times."""

    def __len__(self) -> int: ...

    def rows(self, seed: int) -> Iterable[RequestSpec]:
        """Return the requests; a file gives the same for every seed."""


@dataclass(frozen=True, slots=True)
class LengthLimits:
    """What a model and a run can take: longer prompts and answers are cut, not dropped, so that bursts stay whole."""

    max_prompt_len: int = 2**31
    max_output_len: int = 2**31
    max_total_len: int = 2**31

    def cut(self, row: RequestSpec) -> RequestSpec:
        """Return the request within the limits: at least one token each."""
        output_len = min(row.output_len, self.max_output_len, self.max_total_len - 1)
        prompt_len = min(row.prompt_len, self.max_prompt_len, self.max_total_len - output_len)
        if prompt_len == row.prompt_len and output_len == row.output_len:
            return row
        return replace(row, prompt_len=prompt_len, output_len=output_len)


NO_LIMITS = LengthLimits()


@dataclass(frozen=True, slots=True)
class OpenLoop:
    """The requests of a source, timed and cut. See ``measure.workload.Workload``."""

    source: RequestSource
    arrivals: Arrivals
    limits: LengthLimits = NO_LIMITS
    length_factor: float = 1.0
    """Prompts and answers are shorter by this factor, for small machines."""

    def __post_init__(self) -> None:
        if not 0 < self.length_factor <= 1:
            raise ConfigurationError(f"a length factor of {self.length_factor} cannot be: above 0, at most 1")
        if self.arrivals.kind is ArrivalKind.REPLAY and math.isnan(self.source.rate):
            raise ConfigurationError(
                f"{self.source.name} gives lengths but no arrival times: give --rate, and arrivals are drawn"
            )

    @property
    def name(self) -> str:
        """The source's."""
        return self.source.name

    @property
    def rate(self) -> float:
        """Mean arrival rate in requests/s."""
        return self.source.rate if self.arrivals.rate is None else self.arrivals.rate

    @property
    def is_drawn(self) -> bool:
        """True when another seed gives other requests or other times."""
        return self.arrivals.kind is not ArrivalKind.REPLAY or self.arrivals.batch_s > 0

    def __len__(self) -> int:
        return len(self.source)

    def at_rate(self, rate: float) -> "OpenLoop":
        """Return the same requests at another rate."""
        return replace(self, arrivals=replace(self.arrivals, rate=rate))

    def draw(self, seed: int) -> Iterator[RequestSpec]:
        """Yield the requests in order of arrival; equal seeds give equal requests."""
        for row in self.arrivals.time(self.source.rows(seed), self.source.rate, seed):
            yield self.limits.cut(self._shorten(row))

    def _shorten(self, row: RequestSpec) -> RequestSpec:
        if self.length_factor == 1:
            return row
        return replace(
            row,
            prompt_len=self._scale(row.prompt_len),
            output_len=self._scale(row.output_len),
            prefix=self._shorten_prefix(row.prefix) if row.prefix.ids else row.prefix,
        )

    def _shorten_prefix(self, prefix: PrefixBlocks) -> PrefixBlocks:
        return replace(prefix, block_tokens=self._scale(prefix.block_tokens))

    def _scale(self, num_tokens: int) -> int:
        return max(1, round(num_tokens * self.length_factor))


@dataclass(frozen=True, slots=True)
class FixedLengths:
    """``num_requests`` requests of equal lengths, without times: a source for quick looks and closed forms."""

    prompt_len: int
    output_len: int
    num_requests: int

    @property
    def name(self) -> str:
        """The lengths."""
        return f"{self.prompt_len} in, {self.output_len} out"

    @property
    def rate(self) -> float:
        """NaN: there are no times."""
        return math.nan

    def __len__(self) -> int:
        return self.num_requests

    def rows(self, seed: int) -> Iterator[RequestSpec]:
        """Yield the requests."""
        request = RequestSpec(prompt_len=self.prompt_len, output_len=self.output_len)
        return islice(iter(lambda: request, None), self.num_requests)
