"""Predicted beside actual latencies of sequences, and where they were prefilled, as Prometheus metrics."""

from typing import Final

from prometheus_client import CollectorRegistry, Counter

from disagg.scheduling.dispatch.actions import PathEnded

_LABELS: Final = ("model_name",)


class PredictionMetrics:
    """Sums over the sequences whose path was chosen by predictions: their ratios are the means."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        def counter(name: str, text: str, *more: str) -> Counter:
            return Counter(name, text, (*_LABELS, *more), registry=registry)

        paths = counter("disagg:paths", "Sequences by the path that predictions chose", "path")
        self._paths = {name: paths.labels(model_name, name) for name in ("roles", "leaning")}
        self._leaning_tokens = counter(
            "disagg:leaning_prompt_tokens", "Prompt tokens of sequences that went against the roles"
        ).labels(model_name)
        self._predicted_ttft = counter("disagg:predicted_ttft_seconds", "Sum of predicted TTFT").labels(model_name)
        self._ttft = counter("disagg:predicted_paths_ttft_seconds", "Sum of the TTFT that came").labels(model_name)
        self._ttft_error = counter("disagg:ttft_error_seconds", "Sum of the absolute errors").labels(model_name)
        self._regret = counter(
            "disagg:path_regret_seconds", "Sum of TTFT beyond what the best other path was predicted to bring"
        ).labels(model_name)

    def add(self, ended: PathEnded) -> None:
        """Account for one sequence."""
        self._paths["roles" if ended.follows_roles else "leaning"].inc()
        if not ended.follows_roles:
            self._leaning_tokens.inc(ended.num_prompt_tokens)
        self._predicted_ttft.inc(ended.predicted_ttft_s)
        self._ttft.inc(max(0.0, ended.ttft_s))
        self._ttft_error.inc(abs(ended.predicted_ttft_s - ended.ttft_s))
        self._regret.inc(max(0.0, ended.ttft_regret_s or 0.0))
