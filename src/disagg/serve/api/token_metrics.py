"""Tokens and the gaps between outputs, counted in plain numbers: this is done for every token of every stream."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class TokenMetrics(Collector):
    """What was generated for clients. The event loop alone counts; ``buckets`` of gaps have upper bounds in seconds."""

    def __init__(self, model_name: str, buckets: Sequence[float]) -> None:
        self._model_name = model_name
        self._bounds = tuple(buckets)
        self._num_gaps = [0] * (len(buckets) + 1)
        self._gaps_s = 0.0
        self._num_tokens = 0

    def add(self, num_tokens: int) -> None:
        """Count the tokens of an output."""
        self._num_tokens += num_tokens

    def add_gap(self, gap_s: float) -> None:
        """Count the time between two outputs of one choice."""
        self._num_gaps[bisect_left(self._bounds, gap_s)] += 1
        self._gaps_s += gap_s

    def collect(self) -> Iterable[Metric]:
        """See Collector."""
        tokens = CounterMetricFamily("vllm:generation_tokens", "Tokens generated for clients", labels=["model_name"])
        tokens.add_metric([self._model_name], self._num_tokens)
        gaps = HistogramMetricFamily("vllm:inter_token_latency_seconds", "Gap between outputs", labels=["model_name"])
        bounds = [*map(floatToGoString, self._bounds), "+Inf"]
        buckets = list(zip(bounds, accumulate(self._num_gaps), strict=True))
        gaps.add_metric([self._model_name], buckets, self._gaps_s)
        return tokens, gaps
