"""Predicted beside measured latencies of sequences, and where they were prefilled, as Prometheus metrics."""

from typing import Final

from prometheus_client import CollectorRegistry, Counter

from disagg.scheduling.dispatch.actions import PathEnded

_LATENCIES: Final = ("ttft", "tpot", "hand_over")
_PATHS: Final = ("roles", "leaning")


class PredictionMetrics:
    """Sums over the sequences whose path was chosen by predictions: their ratios are the means."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        def counters(name: str, text: str, label: str, values: tuple[str, ...]) -> dict[str, Counter]:
            family = Counter(name, text, ("model_name", label), registry=registry)
            return {value: family.labels(model_name, value) for value in values}

        self._paths = counters("disagg:paths", "Sequences by the path that predictions chose", "path", _PATHS)
        self._tokens = counters("disagg:path_prompt_tokens", "Their prompt tokens", "path", _PATHS)
        self._predicted = counters("disagg:predicted_seconds", "Latencies as predicted", "latency", _LATENCIES)
        self._measured = counters("disagg:measured_seconds", "The same latencies as they came", "latency", _LATENCIES)
        self._error = counters("disagg:prediction_error_seconds", "Absolute differences", "latency", _LATENCIES)
        self._regret = counters(
            "disagg:path_regret_seconds",
            "Latency beyond what the best other path was predicted to bring",
            "latency",
            ("ttft", "tpot"),
        )

    def add(self, ended: PathEnded) -> None:
        """Account for one sequence."""
        path = "roles" if ended.follows_roles else "leaning"
        self._paths[path].inc()
        self._tokens[path].inc(ended.num_prompt_tokens)
        for latency, predicted_s, measured_s in (
            ("ttft", ended.predicted_ttft_s, ended.ttft_s),
            ("tpot", ended.predicted_tpot_s, ended.tpot_s),
            ("hand_over", ended.predicted_hand_over_s, ended.hand_over_s),
        ):
            if measured_s is not None:
                self._predicted[latency].inc(max(0.0, predicted_s))
                self._measured[latency].inc(max(0.0, measured_s))
                self._error[latency].inc(abs(predicted_s - measured_s))
        for latency, regret_s in (("ttft", ended.ttft_regret_s), ("tpot", ended.tpot_regret_s)):
            self._regret[latency].inc(max(0.0, regret_s or 0.0))
