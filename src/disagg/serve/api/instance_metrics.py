"""What instances report about themselves, as Prometheus metrics read when scraped."""

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from disagg.base.messages import InstanceLoad
from disagg.scheduling.dispatch.state import ALIVE, InstanceState
from disagg.serve.router.interface import InstanceStatus, Router

_Read = Callable[[InstanceStatus], float]
_OfLoad = Callable[[InstanceLoad], float]


def kv_usage(load: InstanceLoad) -> float:
    """Return the share of KV blocks that are held, from 0 to 1; cached ones can be had at any time."""
    held = load.blocks_total - load.blocks_free - load.blocks_cached
    return held / load.blocks_total if load.blocks_total else 0.0


BLOCK_STATES: Final[dict[str, _OfLoad]] = {
    "free": lambda load: load.blocks_free,
    "active": lambda load: load.blocks_active,
    "leased": lambda load: load.blocks_leased,
    "filling": lambda load: load.blocks_filling,
    "cached": lambda load: load.blocks_cached,
    "quarantined": lambda load: load.blocks_quarantined,
}
"""They add up to the pool."""

_GAUGES: Final[tuple[tuple[str, str, _OfLoad], ...]] = (
    ("vllm:num_requests_running", "Sequences in the running batch", lambda load: load.num_running),
    ("vllm:num_requests_waiting", "Sequences that wait for blocks, a place or KV", lambda load: load.num_waiting),
    ("vllm:kv_cache_usage_perc", "Share of KV blocks held (1 is full)", kv_usage),
    ("disagg:step_time_error", "Running mean error of predicted step times (0.1 is 10%)", lambda load: load.step_error),
    ("disagg:kv_host_blocks", "KV blocks in host memory behind the pool", lambda load: load.blocks_on_host),
    ("disagg:kv_disk_blocks", "KV blocks on disk", lambda load: load.blocks_on_disk),
    ("disagg:kv_leases", "Sequences whose blocks wait to be pulled", lambda load: load.num_leases),
)
_COUNTERS: Final[tuple[tuple[str, str, _OfLoad], ...]] = (
    ("vllm:num_preemptions", "Sequences computed again for want of blocks", lambda load: load.num_preemptions_total),
    ("vllm:prefix_cache_queries", "Tokens looked up", lambda load: load.num_prefix_queries_total),
    ("vllm:prefix_cache_hits", "Tokens found", lambda load: load.num_prefix_hits_total),
    (
        "disagg:prefix_cache_pulled",
        "Prompt tokens whose KV another instance lent",
        lambda load: load.num_prefix_pulled_total,
    ),
    (
        "disagg:prefix_cache_from_host",
        "Prompt tokens whose KV came from host memory behind the pool",
        lambda load: load.num_prefix_from_host_total,
    ),
    (
        "disagg:prefix_cache_loaded",
        "Prompt tokens whose KV came from disk",
        lambda load: load.num_prefix_loaded_total,
    ),
    ("disagg:steps", "Model steps", lambda load: load.num_steps_total),
    (
        "disagg:borrowed_core_seconds",
        "Time of other instances' cores that went into steps",
        lambda load: load.borrowed_core_seconds_total,
    ),
    (
        "disagg:steps_timed",
        "Model steps whose time was predicted and measured",
        lambda load: load.num_steps_timed_total,
    ),
    ("disagg:step_seconds", "What those steps took", lambda load: load.step_seconds_total),
    (
        "disagg:step_predicted_seconds",
        "What those steps were predicted to take",
        lambda load: load.step_predicted_seconds_total,
    ),
    ("disagg:prefill_tokens", "Tokens computed in prefill", lambda load: load.num_prefill_tokens_total),
    ("disagg:decode_tokens", "Tokens computed in decode", lambda load: load.num_decode_tokens_total),
    ("disagg:kv_leases_expired", "Leases that nobody used", lambda load: load.num_leases_expired_total),
)
_LABELS: Final = ("model_name", "instance", "role")


class InstanceCollector(Collector):
    """Reads the instances' last load reports. Their counters start anew with the instance, as Prometheus expects."""

    def __init__(self, router: Router, model_name: str) -> None:
        self._router = router
        self._model_name = model_name

    def collect(self) -> Iterable[Metric]:
        """Yield gauges and counters, one sample for each instance."""
        instances = self._router.instances()
        up = GaugeMetricFamily("disagg:instance_up", "1 while an instance is ready or draining", labels=_LABELS)
        yield self._fill(up, instances, lambda status: status.state in ALIVE)
        draining = GaugeMetricFamily("disagg:instance_draining", "1 while an instance is draining", labels=_LABELS)
        yield self._fill(draining, instances, lambda status: status.state is InstanceState.DRAINING)
        restarts = CounterMetricFamily("disagg:instance_restarts", "Deaths of an instance's process", labels=_LABELS)
        yield self._fill(restarts, instances, lambda status: status.num_restarts)
        for name, text, read in _GAUGES:
            yield self._fill(GaugeMetricFamily(name, text, labels=_LABELS), instances, _of_load(read))
        for name, text, read in _COUNTERS:
            yield self._fill(CounterMetricFamily(name, text, labels=_LABELS), instances, _of_load(read))
        yield self._blocks(instances)

    def _fill(
        self, family: GaugeMetricFamily | CounterMetricFamily, instances: Sequence[InstanceStatus], read: _Read
    ) -> Metric:
        for status in instances:
            family.add_metric((self._model_name, status.instance, status.role.value), float(read(status)))
        return family

    def _blocks(self, instances: Sequence[InstanceStatus]) -> Metric:
        labels = (*_LABELS, "state")
        family = GaugeMetricFamily("disagg:kv_blocks", "KV blocks by state; they add up to the pool", labels=labels)
        for status in instances:
            for state, read in BLOCK_STATES.items():
                values = (self._model_name, status.instance, status.role.value, state)
                family.add_metric(values, float(read(status.load)))
        return family


def _of_load(read: _OfLoad) -> _Read:
    return lambda status: read(status.load)
