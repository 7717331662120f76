"""Prompt and answer lengths drawn like those of a trace: its quantiles, and how the two lengths go together."""

import math
import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final

import msgspec
import numpy as np

from disagg.base.errors import ConfigurationError
from disagg.measure.workload import RequestSpec

PROBABILITIES: Final = (0.0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
"""Where the quantiles of a fitted distribution are kept."""
_MIN_ROWS: Final = 50
_NORMAL: Final = NormalDist()


class LengthDistribution(msgspec.Struct, frozen=True, kw_only=True):
    """Quantiles of both lengths in tokens at ``PROBABILITIES``, and their rank correlation (a Gaussian copula)."""

    prompt_quantiles: tuple[float, ...]
    output_quantiles: tuple[float, ...]
    correlation: float

    @classmethod
    def fit(cls, rows: Sequence[RequestSpec]) -> "LengthDistribution":
        """Return the distribution of the lengths of ``rows``; raise ConfigurationError for fewer than 50."""
        if len(rows) < _MIN_ROWS:
            raise ConfigurationError(f"{len(rows)} requests are too few to fit lengths to: at least {_MIN_ROWS}")
        prompt = np.array([row.prompt_len for row in rows], dtype=np.float64)
        output = np.array([row.output_len for row in rows], dtype=np.float64)
        return cls(
            prompt_quantiles=_quantiles(prompt),
            output_quantiles=_quantiles(output),
            correlation=_normal_score_correlation(prompt, output),
        )

    def draw(self, rng: random.Random) -> tuple[int, int]:
        """Return a prompt and an output length in tokens, at least one each."""
        first, second = rng.gauss(), rng.gauss()
        second = self.correlation * first + math.sqrt(1 - self.correlation**2) * second
        prompt = _interpolate(self.prompt_quantiles, _NORMAL.cdf(first))
        output = _interpolate(self.output_quantiles, _NORMAL.cdf(second))
        return max(1, round(prompt)), max(1, round(output))


@dataclass(frozen=True, slots=True)
class DrawnLengths:
    """``num_requests`` requests with lengths of a distribution, without times. See ``open_loop.RequestSource``."""

    name: str
    distribution: LengthDistribution
    num_requests: int

    @property
    def rate(self) -> float:
        """NaN: there are no times."""
        return math.nan

    def __len__(self) -> int:
        return self.num_requests

    def rows(self, seed: int) -> Iterator[RequestSpec]:
        """Yield the requests; equal seeds give equal lengths."""
        rng = random.Random(f"lengths {seed}")
        for _ in range(self.num_requests):
            prompt_len, output_len = self.distribution.draw(rng)
            yield RequestSpec(prompt_len=prompt_len, output_len=output_len)


def _quantiles(lengths: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> tuple[float, ...]:
    return tuple(float(value) for value in np.quantile(lengths, PROBABILITIES))


def _normal_score_correlation(
    prompt: "np.ndarray[tuple[int], np.dtype[np.float64]]", output: "np.ndarray[tuple[int], np.dtype[np.float64]]"
) -> float:
    """Return the correlation of the normal scores of the ranks; equal values share their mean rank."""
    scores = []
    for values in (prompt, output):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        last = np.cumsum(counts)
        ranks = (last - (counts - 1) / 2)[inverse]
        scores.append(np.array([_NORMAL.inv_cdf((rank - 0.5) / len(values)) for rank in ranks]))
    first, second = scores
    if first.std() == 0 or second.std() == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


def _interpolate(quantiles: Sequence[float], probability: float) -> float:
    """Return the quantile, between its neighbours geometrically: lengths spread over orders of magnitude."""
    right = min(bisect_right(PROBABILITIES, probability), len(PROBABILITIES) - 1)
    left = right - 1
    part = (probability - PROBABILITIES[left]) / (PROBABILITIES[right] - PROBABILITIES[left])
    low, high = max(1.0, quantiles[left]), max(1.0, quantiles[right])
    return low * math.pow(high / low, part)
