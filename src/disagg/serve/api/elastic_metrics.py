"""How the deployment changes by itself, as metrics: what was decided, and the predictions that it was decided by."""

from collections.abc import Iterable
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from disagg.scheduling.router.outputs import PlanDecided, ScalingDecided
from disagg.serve.router.interface import Router

_LABELS: Final = ("model_name", "role")


class ElasticMetrics:
    """Counts the changes that were decided."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self._model_name = model_name
        self._scalings = Counter(
            "disagg:scalings",
            "Instances that autoscaling added and removed",
            (*_LABELS, "direction"),
            registry=registry,
        )
        self._plans = Counter(
            "disagg:plans",
            "Times that the placement was planned anew, by what was made of it: changed, advised or stayed",
            ("model_name", "verdict"),
            registry=registry,
        )
        self._planned = Gauge(
            "disagg:planned_attainment",
            "Attainment that the last plan predicts of the present placement, and of the best that can be reached",
            ("model_name", "placement"),
            registry=registry,
        )

    def plan_decided(self, decided: PlanDecided) -> None:
        """Count a plan, and keep its figures."""
        verdict = "changed" if decided.acts else "advised" if decided.pays else "stayed"
        self._plans.labels(self._model_name, verdict).inc()
        self._planned.labels(self._model_name, "present").set(decided.attainment)
        self._planned.labels(self._model_name, "best").set(decided.best_attainment)

    def scaling_decided(self, decided: ScalingDecided) -> None:
        """Count the instances that come, or go."""
        direction = "added" if decided.wanted > decided.count else "removed"
        self._scalings.labels(self._model_name, decided.role.value, direction).inc(abs(decided.wanted - decided.count))


class ScalingCollector(Collector):
    """Reads the roles that are scaled when ``/metrics`` is scraped."""

    def __init__(self, router: Router, model_name: str) -> None:
        self._router = router
        self._model_name = model_name

    def collect(self) -> Iterable[Metric]:
        """Yield numbers of instances and the attainment predicted for them; nothing of what cannot be predicted."""
        counts = GaugeMetricFamily("disagg:scaled_instances", "Instances of a role that is scaled", labels=_LABELS)
        kept = GaugeMetricFamily(
            "disagg:predicted_attainment",
            "Part of the requests predicted to keep the objectives, with so many instances more than there are",
            labels=(*_LABELS, "more"),
        )
        for view in self._router.scaling():
            counts.add_metric((self._model_name, view.role), float(view.count))
            for more, attainment in (("0", view.attainment), ("-1", view.attainment_with_fewer)):
                if attainment is not None:
                    kept.add_metric((self._model_name, view.role, more), attainment)
        yield counts
        yield kept
