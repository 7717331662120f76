"""Measured operator times of one GPU, read from CSV files, and interpolation between them.

The files are those of ``aiconfigurator``'s operator database: ``<gpu>.*gemm_bf16*`` (m, n, k), ``*context_attention_*``
and ``*generation_attention_*`` (batch_size, isl, step, num_heads, num_key_value_heads; one layer), ``*allreduce_bf16*``
(num_gpus, message_size_elements), each with ``latency_ms``. All interpolation is linear in logarithms: exact for power
laws, which is what operator times are between their kinks.
"""

import csv
import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from disagg.base.errors import ConfigurationError
from disagg.costs.fit import FitError, relative_error

LATENCY: Final = "latency_ms"
GEMM_COLUMNS: Final = ("m", "n", "k", LATENCY)
ATTENTION_COLUMNS: Final = ("batch_size", "isl", "step", "num_heads", "num_key_value_heads", LATENCY)
ALL_REDUCE_COLUMNS: Final = ("num_gpus", "message_size_elements", LATENCY)
_LARGEST: Final = 1e12


class Curve:
    """Seconds over a positive quantity, interpolated in logarithms; past either end the last slope goes on."""

    def __init__(self, points: Mapping[float, float]) -> None:
        pairs = sorted((math.log(x), math.log(y)) for x, y in points.items())
        if len(pairs) < 2:
            raise ConfigurationError("a curve needs at least two measured points")
        self._x = [x for x, _ in pairs]
        self._y = [y for _, y in pairs]

    def __call__(self, x: float) -> float:
        """Return the seconds at ``x``; nothing takes no time."""
        if x <= 0:
            return 0.0
        log_x = math.log(x)
        index = min(max(bisect_right(self._x, log_x) - 1, 0), len(self._x) - 2)
        x0, x1 = self._x[index], self._x[index + 1]
        y0, y1 = self._y[index], self._y[index + 1]
        # Below the first point the operator is all overhead.
        share = max(0.0, (log_x - x0) / (x1 - x0))
        return math.exp(y0 + share * (y1 - y0))

    def hold_out_error(self) -> tuple[list[float], list[float]]:
        """Return predictions of each inner point by its neighbours, and the points themselves."""
        predicted, measured = [], []
        for index in range(1, len(self._x) - 1):
            share = (self._x[index] - self._x[index - 1]) / (self._x[index + 1] - self._x[index - 1])
            log_y = self._y[index - 1] + share * (self._y[index + 1] - self._y[index - 1])
            predicted.append(math.exp(log_y))
            measured.append(math.exp(self._y[index]))
        return predicted, measured


class MatmulTable:
    """Times of ``[m, k] @ [k, n]``."""

    def __init__(self, rows: Iterable[Mapping[str, str]]) -> None:
        times: dict[tuple[int, int], dict[float, float]] = defaultdict(dict)
        for row in rows:
            times[int(row["n"]), int(row["k"])][float(row["m"])] = float(row["latency_ms"]) / 1e3
        self._times = dict(times)
        self._sizes = sorted({n for n, _ in times})

    def curve(self, n: int, k: int) -> Curve:
        """Return the times over m: between the measured widths; beyond them in proportion to the weights."""
        corners = [(a, b, v * w) for a, v in self._weights(n) for b, w in self._weights(k)]
        known = [(self._times[a, b], w) for a, b, w in corners if (a, b) in self._times and w > 0]
        if not known:
            raise ConfigurationError(f"the GEMM table has no sizes near {n} x {k}")
        total = sum(w for _, w in known)
        shared = set.intersection(*(set(times) for times, _ in known))
        scale = max(1.0, n / self._sizes[-1]) * max(1.0, k / self._sizes[-1])
        return Curve({m: scale * math.exp(sum(w * math.log(times[m]) for times, w in known) / total) for m in shared})

    def error(self) -> FitError:
        """Return how far each measured point is from what its neighbours in m would predict."""
        return _error(Curve(times) for times in self._times.values())

    def _weights(self, size: int) -> list[tuple[int, float]]:
        """Return the measured sizes round ``size`` with their parts in it."""
        above = bisect_right(self._sizes, size)
        if above == 0 or above == len(self._sizes):
            return [(self._sizes[max(0, above - 1)], 1.0)]
        low, high = self._sizes[above - 1], self._sizes[above]
        share = math.log(size / low) / math.log(high / low)
        return [(low, 1 - share), (high, share)]


class AttentionTable:
    """Times of one layer's attention by heads: prefill over isl squared, decode over batch and context."""

    def __init__(self, prefill: Iterable[Mapping[str, str]], decode: Iterable[Mapping[str, str]]) -> None:
        self._prefill: dict[tuple[int, int], dict[float, float]] = defaultdict(dict)
        self._decode: dict[tuple[int, int], dict[int, dict[float, float]]] = defaultdict(lambda: defaultdict(dict))
        for row in prefill:
            if row["batch_size"] == "1":
                self._prefill[_heads(row)][float(row["isl"]) ** 2] = float(row["latency_ms"]) / 1e3
        for row in decode:
            context = float(row["isl"]) + float(row["step"])
            self._decode[_heads(row)][int(row["batch_size"])][context] = float(row["latency_ms"]) / 1e3

    def prefill_curve(self, num_heads: int, num_kv_heads: int) -> Curve:
        """Return the time over the sum of squared prompt lengths (``StepShape.prefill_squares``)."""
        heads, scale = _nearest(self._prefill, num_heads, num_kv_heads)
        return Curve({squares: time_s * scale for squares, time_s in self._prefill[heads].items()})

    def decode(self, num_heads: int, num_kv_heads: int) -> "DecodeAttention":
        """Return the time over batch and context.

        More KV heads than measured make a sequence count as several, each with the most heads there are.
        """
        heads, factor = _nearest(self._decode, num_heads, num_kv_heads)
        batches = {batch: times for batch, times in self._decode[heads].items() if len(times) > 1}
        return DecodeAttention({size: Curve(times) for size, times in sorted(batches.items())}, factor)

    def error(self) -> FitError:
        """Return how far each measured point is from what its neighbours would predict."""
        curves = [Curve(times) for times in self._prefill.values()]
        curves += [Curve(t) for by_batch in self._decode.values() for t in by_batch.values() if len(t) > 1]
        return _error(curves)


class DecodeAttention:
    """Time of a batch of decodes: ``curves`` over the context by measured batch size, in order."""

    def __init__(self, curves: Mapping[int, Curve], factor: float) -> None:
        self._batches = list(curves)
        self._curves = list(curves.values())
        self._factor = factor

    def __call__(self, num_decodes: int, mean_context: float) -> float:
        """Interpolate between the two measured batches round this one; beyond the largest, in proportion."""
        batch = num_decodes * self._factor
        above = bisect_right(self._batches, batch)
        if above == 0:
            return self._curves[0](mean_context)
        if above == len(self._batches):
            return self._curves[-1](mean_context) * batch / self._batches[-1]
        low, high = self._batches[above - 1], self._batches[above]
        share = (batch - low) / (high - low)
        return (1 - share) * self._curves[above - 1](mean_context) + share * self._curves[above](mean_context)


class AllReduceTable:
    """Times of an all-reduce by number of devices, the faster of the measured ways at each size."""

    def __init__(self, rows: Iterable[Mapping[str, str]]) -> None:
        self._times: dict[int, dict[float, float]] = defaultdict(dict)
        for row in rows:
            times, size = self._times[int(row["num_gpus"])], float(row["message_size_elements"])
            times[size] = min(times.get(size, math.inf), float(row["latency_ms"]) / 1e3)

    def curve(self, num_devices: int) -> Curve:
        """Return the time over elements; raise ConfigurationError when that many devices were not measured."""
        if num_devices not in self._times:
            known = ", ".join(str(count) for count in sorted(self._times))
            raise ConfigurationError(
                f"the table has no all-reduce over {num_devices} devices, only over {known}: "
                "choose another tensor parallelism"
            )
        return Curve(self._times[num_devices])


def read_rows(folder: Path, pattern: str, columns: Sequence[str] = ()) -> list[dict[str, str]]:
    """Read the CSV file of this name pattern, whose ``columns`` are numbers.

    Raises ConfigurationError unless there is exactly one such file, with the line of a number that cannot be.
    """
    files = sorted(folder.glob(pattern))
    if len(files) != 1:
        found = ", ".join(path.name for path in files) or "none"
        raise ConfigurationError(f"{folder} must hold one file {pattern}; found {found}")
    rows = []
    try:
        with files[0].open(encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines)
            for row in reader:
                for column in columns:
                    _check(row, column, f"{files[0]}, line {reader.line_num}")
                rows.append(row)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigurationError(f"cannot read the operator table {files[0]}: {error}") from error
    if not rows:
        raise ConfigurationError(f"{files[0]} holds no measurements")
    return rows


def _check(row: Mapping[str, str | None], column: str, place: str) -> None:
    text = row.get(column)
    if text is None:
        raise ConfigurationError(f"{place}: there is no column {column}, or it is cut off")
    try:
        value = float(text) if column == LATENCY else int(text)
    except ValueError as error:
        raise ConfigurationError(f"{place}: {text!r} in the column {column} is no number") from error
    if not (value >= 0 if column == "step" else value > 0) or not value <= _LARGEST:
        raise ConfigurationError(f"{place}: {text} in the column {column} cannot be")


def _heads(row: Mapping[str, str]) -> tuple[int, int]:
    return int(row["num_heads"]), int(row["num_key_value_heads"])


def _nearest(known: Iterable[tuple[int, int]], num_heads: int, num_kv_heads: int) -> tuple[tuple[int, int], float]:
    """Return the measured heads with the same grouping that are nearest, and how many of them make up the wanted."""
    group = num_heads / num_kv_heads
    closeness = {
        heads: (abs(math.log(heads[0] / heads[1] / group)), abs(math.log(heads[1] / num_kv_heads))) for heads in known
    }
    heads = min(closeness, key=lambda entry: closeness[entry])
    return heads, num_kv_heads / heads[1]


def _error(curves: Iterable[Curve]) -> FitError:
    predicted: list[float] = []
    measured: list[float] = []
    for curve in curves:
        more_predicted, more_measured = curve.hold_out_error()
        predicted += more_predicted
        measured += more_measured
    return relative_error(_array(predicted), _array(measured))


def _array(values: list[float]) -> NDArray[np.float64]:
    return np.array(values, dtype=np.float64)
