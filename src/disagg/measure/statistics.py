"""Percentiles of latencies, and how sure one can be of a mean or of a share."""

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Final

import msgspec
import numpy as np
from numpy.typing import ArrayLike

# Two-sided 95% quantiles of Student's t for 1 to 30 degrees of freedom; beyond, the normal distribution's.
_T95: Final = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
_NORMAL95: Final = 1.960


class Percentiles(msgspec.Struct, frozen=True, kw_only=True):
    """Of the requests (for ITL: of the gaps) that have the value, in seconds; NaN where none has."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: ArrayLike) -> "Percentiles":
        """Return those of ``values``; NaN values do not count."""
        data = np.asarray(values, dtype=np.float64)
        data = data[~np.isnan(data)]
        if not len(data):
            return cls(mean=math.nan, p50=math.nan, p90=math.nan, p99=math.nan)
        p50, p90, p99 = (float(value) for value in np.percentile(data, (50, 90, 99)))
        return cls(mean=float(data.mean()), p50=p50, p90=p90, p99=p99)

    @classmethod
    def mean_of(cls, runs: Sequence["Percentiles"]) -> "Percentiles":
        """Return the means over runs, one for each seed."""
        return cls(
            mean=fmean(run.mean for run in runs),
            p50=fmean(run.p50 for run in runs),
            p90=fmean(run.p90 for run in runs),
            p99=fmean(run.p99 for run in runs),
        )


class LogHistogram:
    """Counts of positive values in bins 1% wide: percentiles of any number of values in little memory."""

    _LOG_WIDTH: Final = math.log(1.01)

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        # An integer, in parts of 1e12: the mean does not depend on the order of the values.
        self._sum = 0
        self._total = 0

    def add(self, value: float, count: int = 1) -> None:
        """Count ``value``, above 0, ``count`` times."""
        self._counts[math.floor(math.log(value) / self._LOG_WIDTH)] += count
        self._sum += round(value * 1e12) * count
        self._total += count

    def add_all(self, values: Iterable[float]) -> None:
        """Count each of these that is above 0; NaN is not. Equal ones that follow each other cost as much as one."""
        last, count = 0.0, 0
        for value in values:
            if value == last:
                count += 1
                continue
            if last > 0:
                self.add(last, count)
            last, count = value, 1
        if last > 0:
            self.add(last, count)

    def add_between(self, times_s: Sequence[float], count: int) -> None:
        """Count each difference between neighbours of ``times_s``, which ascend, ``count`` times."""
        counts, width, log, before_s = self._counts, self._LOG_WIDTH, math.log, times_s[0]
        total = 0
        for time_s in times_s[1:]:
            value = time_s - before_s
            before_s = time_s
            counts[math.floor(log(value) / width)] += count
            total += round(value * 1e12)
        self._sum += total * count
        self._total += count * (len(times_s) - 1)

    def percentiles(self) -> "Percentiles":
        """Return them to 0.5%; the mean is exact."""
        if not self._total:
            return Percentiles.of([])
        bins = sorted(self._counts)
        totals = np.cumsum([self._counts[number] for number in bins])
        ranks = np.searchsorted(totals, np.array((0.5, 0.9, 0.99)) * self._total)
        p50, p90, p99 = (math.exp((bins[rank] + 0.5) * self._LOG_WIDTH) for rank in ranks)
        return Percentiles(mean=self._sum / self._total * 1e-12, p50=p50, p90=p90, p99=p99)


class ValueSketch:
    """Percentiles of positive values in bounded memory: exact for up to ``MOST_EXACT`` of them, then to 0.5%."""

    MOST_EXACT: Final = 100_000

    def __init__(self) -> None:
        self._values = array("d")
        self._rest: LogHistogram | None = None

    def add(self, value: float) -> None:
        """Count a value, above 0."""
        if self._rest is not None:
            self._rest.add(value)
            return
        self._values.append(value)
        if len(self._values) > self.MOST_EXACT:
            self._rest = LogHistogram()
            for one in self._values:
                self._rest.add(one)
            self._values = array("d")

    def percentiles(self) -> Percentiles:
        """Return them; the mean is always exact."""
        return Percentiles.of(self._values) if self._rest is None else self._rest.percentiles()


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """A mean over runs with its 95% confidence interval; ``half_width`` is NaN for a single run."""

    mean: float
    half_width: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """Return the estimate from one value per run, by Student's t."""
        mean = sum(values) / len(values)
        if len(values) < 2:
            return cls(mean=mean, half_width=math.nan)
        if min(values) == max(values):
            return cls(mean=values[0], half_width=0.0)  # to the last bit, which sums and roots would miss
        quantile = _T95[len(values) - 2] if len(values) - 2 < len(_T95) else _NORMAL95
        return cls(mean=mean, half_width=quantile * float(np.std(values, ddof=1)) / math.sqrt(len(values)))


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """How many of how many, with Wilson's 95% interval: what one run says of the share of all such requests."""

    count: int
    total: int
    share: float
    low: float
    high: float

    @classmethod
    def of(cls, count: int, total: int) -> "Share":
        """Return the share; of nothing at all, 0 with the interval from 0 to 1."""
        if total == 0:
            return cls(count=0, total=0, share=0.0, low=0.0, high=1.0)
        share, z2 = count / total, _NORMAL95**2
        center = (share + z2 / (2 * total)) / (1 + z2 / total)
        half = _NORMAL95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2)) / (1 + z2 / total)
        # At the ends the formula gives the share itself, but for rounding.
        low, high = min(max(0.0, center - half), share), max(min(1.0, center + half), share)
        return cls(count=count, total=total, share=share, low=low, high=high)

    @classmethod
    def that(cls, holds: Iterable[bool]) -> "Share":
        """Return the share of true values."""
        values = list(holds)
        return cls.of(sum(values), len(values))
