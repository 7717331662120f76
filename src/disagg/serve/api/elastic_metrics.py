"""How the deployment changes by itself, as metrics: what was decided, and the predictions that it was decided by."""

from collections.abc import Iterable
from typing import Final

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from disagg.scheduling.router.scaling import ScalingView
from disagg.serve.router.interface import Router

_LABELS: Final = ("model_name", "role")


class ElasticCollector(Collector):
    """Reads what is known of the roles that are scaled, and of plans, when ``/metrics`` is scraped."""

    def __init__(self, router: Router, model_name: str) -> None:
        self._router = router
        self._model_name = model_name

    def collect(self) -> Iterable[Metric]:
        """Yield what was decided, and what is predicted; nothing of what cannot be predicted."""
        view = self._router.elastic_view()
        yield from self._scaling(view.scaling)
        plans = CounterMetricFamily(
            "disagg:plans",
            "Times that the placement was planned anew, by what was made of it: changed, advised or stayed",
            labels=("model_name", "verdict"),
        )
        planned = GaugeMetricFamily(
            "disagg:planned_attainment",
            "Attainment that the last plan predicts of the present placement, and of the best that can be reached",
            labels=("model_name", "placement"),
        )
        if view.plan is not None:
            counts = view.plans
            verdicts = (("changed", counts.num_changed), ("advised", counts.num_advised), ("stayed", counts.num_stayed))
            for verdict, count in verdicts:
                plans.add_metric((self._model_name, verdict), float(count))
            planned.add_metric((self._model_name, "present"), view.plan.attainment)
            planned.add_metric((self._model_name, "best"), view.plan.best_attainment)
        yield plans
        yield planned

    def _scaling(self, views: Iterable[ScalingView]) -> Iterable[Metric]:
        counts = GaugeMetricFamily("disagg:scaled_instances", "Instances of a role that is scaled", labels=_LABELS)
        kept = GaugeMetricFamily(
            "disagg:predicted_attainment",
            "Part of the requests predicted to keep the objectives, with so many instances more than there are",
            labels=(*_LABELS, "more"),
        )
        changes = CounterMetricFamily(
            "disagg:scalings", "Instances that autoscaling added and removed", labels=(*_LABELS, "direction")
        )
        for view in views:
            counts.add_metric((self._model_name, view.role), float(view.count))
            for more, attainment in (("0", view.attainment), ("-1", view.attainment_with_fewer)):
                if attainment is not None:
                    kept.add_metric((self._model_name, view.role, more), attainment)
            for direction, number in (("added", view.num_added), ("removed", view.num_removed)):
                changes.add_metric((self._model_name, view.role, direction), float(number))
        return counts, kept, changes
