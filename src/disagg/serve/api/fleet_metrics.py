"""What is found out where instances are kept, as Prometheus metrics: counted once beside any number of routers."""

import logging

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from disagg.base.ids import InstanceId
from disagg.scheduling.router.outputs import LinkFound
from disagg.serve.router.sink import NullSink

logger = logging.getLogger(__name__)


class FleetMetrics(NullSink):
    """Deaths and links: the sink of the process that keeps the instances, and a part of a lone router's."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._registry = CollectorRegistry()
        self._lost_instances = Counter(
            "disagg:instance_losses",
            "Deaths of instances that were ready",
            ("model_name", "instance"),
            registry=self._registry,
        )
        self._link_speed = self._link_gauge(
            "disagg:kv_link_bytes_per_second", "What a link was measured to carry from one instance to another"
        )
        self._link_limit = self._link_gauge(
            "disagg:kv_link_limit_bytes_per_second",
            "What the hardware under that link gives; 0 where nobody knows",
        )

    def _link_gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, ("model_name", "source", "target"), registry=self._registry)

    def exposition(self) -> bytes:
        """Return what was counted here, in Prometheus' text format."""
        return generate_latest(self._registry)

    def instance_lost(self, instance: InstanceId) -> None:
        """Count a death."""
        self._lost_instances.labels(self._model_name, instance).inc()

    def link_found(self, found: LinkFound) -> None:
        """Show how fast a link is; log what is wrong with it."""
        if found.warning:
            logger.warning("link from %s to %s: %s", found.source, found.target, found.warning)
        figure = found.figure
        labels = (self._model_name, found.source, found.target)
        self._link_speed.labels(*labels).set(figure.bytes_per_s)
        self._link_limit.labels(*labels).set(figure.limit_bytes_per_s)
