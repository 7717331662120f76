"""Predicted beside measured latencies of sequences, their paths, what was not taken, and attainment: as metrics."""

from typing import Final

from prometheus_client import CollectorRegistry, Counter

from disagg.scheduling.dispatch.actions import PathEnded, RefuseReason
from disagg.serve.api.views import PredictionTotals

_LATENCIES: Final = ("ttft", "tpot", "hand_over")
_MOST_PRIORITY: Final = 3
_PATHS: Final = ("roles", "leaning")


class PredictionMetrics:
    """Sums over the sequences whose path was chosen by predictions: their ratios are the means."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self.totals = PredictionTotals()
        self._model_name = model_name

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
        self._held = Counter(
            "disagg:objectives",
            "Sequences by whether they kept their objectives; what failed, was refused or lost its client did not",
            ("model_name", "service_class", "outcome"),
            registry=registry,
        )
        self._refused = Counter(
            "disagg:refused_sequences",
            f"Sequences that were not taken; priorities beyond {_MOST_PRIORITY} count as that",
            ("model_name", "reason", "priority", "service_class"),
            registry=registry,
        )
        self._degraded = Counter(
            "disagg:degraded_sequences",
            "Sequences served as best effort",
            ("model_name", "service_class"),
            registry=registry,
        )

    def held_to_objectives(self, service_class: str, *, has_kept: bool) -> None:
        """Count a sequence that ended, and whether it kept its objectives; what failed or was refused did not."""
        kept, missed = (self._held.labels(self._model_name, service_class, outcome) for outcome in ("kept", "missed"))
        (kept if has_kept else missed).inc()

    def refused(self, reason: RefuseReason, priority: int, service_class: str) -> None:
        """Count a sequence that was not taken."""
        shown = str(min(max(priority, -_MOST_PRIORITY), _MOST_PRIORITY))
        self._refused.labels(self._model_name, reason.value, shown, service_class).inc()
        self.totals.num_refused_total += 1
        self.totals.num_shed_total += reason is RefuseReason.SHED

    def degraded(self, service_class: str) -> None:
        """Count a sequence that is served as best effort."""
        self._degraded.labels(self._model_name, service_class).inc()
        self.totals.num_degraded_total += 1

    def add(self, ended: PathEnded) -> None:
        """Account for one sequence."""
        self._add_to_totals(ended)
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

    def _add_to_totals(self, ended: PathEnded) -> None:
        totals = self.totals
        totals.num_total += 1
        totals.prompt_tokens_total += ended.num_prompt_tokens
        if not ended.follows_roles:
            totals.num_leaning_total += 1
            totals.leaning_prompt_tokens_total += ended.num_prompt_tokens
        totals.ttft_seconds_total += ended.ttft_s
        totals.ttft_error_seconds_total += abs(ended.predicted_ttft_s - ended.ttft_s)
        totals.ttft_regret_seconds_total += max(0.0, ended.ttft_regret_s or 0.0)
