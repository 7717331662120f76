"""Prometheus metrics: vLLM's names where one exists, so that existing dashboards and autoscalers work.

Counters and histograms are fed as requests go by; what an instance knows about itself (queues, KV blocks, steps) is
read from its last load report when ``/metrics`` is scraped.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from disagg.base.clock import Clock
from disagg.base.ids import InstanceId
from disagg.base.messages import InstanceLoad
from disagg.measure.timeline import Stage
from disagg.serve.api.generation import Choice, Delta
from disagg.serve.router.interface import InstanceState, InstanceStatus, Router
from disagg.serve.router.sink import DropReason

logger = logging.getLogger(__name__)

TTFT_BUCKETS: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
    *(160.0, 640.0, 2560.0),
)
TOKEN_BUCKETS: Final = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0),
)
REQUEST_BUCKETS: Final = (
    *(0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0),
    *(480.0, 960.0, 1920.0, 7680.0),
)
_Read = Callable[[InstanceStatus], float]
_OfLoad = Callable[[InstanceLoad], float]
_BLOCK_STATES: Final = ("free", "active", "leased", "filling", "cached", "quarantined")


class ServerMetrics:
    """All metrics of one server; also the router's sink for what it counts."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self.model_name = model_name
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens of answered requests")
        self.generation_tokens = self._counter("vllm:generation_tokens", "Tokens sent to clients")
        self.success = self._counter("vllm:request_success", "Choices that ended, by reason", "finished_reason")
        self.ttft = self._histogram("vllm:time_to_first_token_seconds", "Arrival to first token", TTFT_BUCKETS)
        self.inter_token = self._histogram("vllm:inter_token_latency_seconds", "Gap between tokens", TOKEN_BUCKETS)
        self.time_per_output_token = self._histogram(
            "vllm:request_time_per_output_token_seconds", "(last - first token) / (tokens - 1)", TOKEN_BUCKETS
        )
        self.e2e = self._histogram("vllm:e2e_request_latency_seconds", "Arrival to last token", REQUEST_BUCKETS)
        self.queue_time = self._histogram("vllm:request_queue_time_seconds", "Time in queues", REQUEST_BUCKETS)
        self.prefill_time = self._histogram("vllm:request_prefill_time_seconds", "Time in prefill", REQUEST_BUCKETS)
        self.decode_time = self._histogram("vllm:request_decode_time_seconds", "Time in decode", REQUEST_BUCKETS)
        self.stage = self._histogram(
            "disagg:request_stage_seconds", "Time of each stage; they add up to the whole", REQUEST_BUCKETS, "stage"
        )
        self.hand_over = self._histogram("disagg:hand_over_seconds", "Time of one KV pull", TOKEN_BUCKETS)
        self.hand_over_bytes = self._counter("disagg:hand_over_bytes", "KV bytes pulled")
        self.hand_over_failures = self._counter("disagg:hand_over_failures", "KV pulls that did not succeed")
        self.dropped_messages = self._counter("disagg:dropped_messages", "Messages of instances not used", "reason")
        self.lost_instances = self._counter("disagg:instance_losses", "Deaths of instances", "instance")

    def watch(self, router: Router) -> None:
        """Export what the instances report about themselves."""
        self.registry.register(InstanceCollector(router, self.model_name))

    def exposition(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    # RouterSink ---------------------------------------------------------------------------------------------

    def hand_over_ended(
        self, source: InstanceId, target: InstanceId, num_bytes: int, duration_s: float, failure: str
    ) -> None:
        """Count one pull; a failed one is also logged, since it makes a request slower without failing it."""
        if failure:
            logger.warning("%s could not pull KV blocks from %s: %s", target, source, failure)
            self.hand_over_failures.labels(self.model_name).inc()
            return
        self.hand_over.labels(self.model_name).observe(duration_s)
        self.hand_over_bytes.labels(self.model_name).inc(num_bytes)

    def message_dropped(self, instance: InstanceId, reason: DropReason) -> None:
        """Count a message that was not used."""
        self.dropped_messages.labels(self.model_name, reason.value).inc()

    def instance_lost(self, instance: InstanceId) -> None:
        """Count a death."""
        self.lost_instances.labels(self.model_name, instance).inc()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        counter = Counter(name, text, ("model_name", *labels), registry=self.registry)
        if not labels:
            counter.labels(self.model_name)
        return counter

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(name, text, ("model_name", *labels), registry=self.registry, buckets=buckets)


class RequestObserver:
    """Accounts for one API request: its latencies as tokens come, its stages and one log line at its end."""

    def __init__(
        self, metrics: ServerMetrics, clock: Clock, response_id: str, num_prompt_tokens: int, arrival_s: float
    ) -> None:
        self._metrics = metrics
        self._clock = clock
        self._response_id = response_id
        self._num_prompt_tokens = num_prompt_tokens
        self._arrival_s = arrival_s
        self._first_s: dict[int, float] = {}
        self._last_s: dict[int, float] = {}
        # Labelled children are looked up once, not for every token.
        self._inter_token = metrics.inter_token.labels(metrics.model_name)
        self._generation_tokens = metrics.generation_tokens.labels(metrics.model_name)

    def see(self, delta: Delta) -> None:
        """Account for one delta."""
        now = self._clock.now()
        if delta.choice not in self._first_s:
            self._first_s[delta.choice] = now
            self._metrics.ttft.labels(self._metrics.model_name).observe(now - self._arrival_s)
        else:
            self._inter_token.observe(now - self._last_s[delta.choice])
        self._last_s[delta.choice] = now
        self._generation_tokens.inc(len(delta.token_ids))

    def end(self, choices: Sequence[Choice]) -> None:
        """Account for the request's end, and say so in the log."""
        metrics, name = self._metrics, self._metrics.model_name
        if self._first_s:
            metrics.prompt_tokens.labels(name).inc(self._num_prompt_tokens)
        for index, choice in enumerate(choices):
            reason = choice.finish_reason.value if choice.finish_reason is not None else "abort"
            metrics.success.labels(name, reason).inc()
            if choice.finish_reason is None or choice.stream is None or index not in self._first_s:
                continue
            first_s, last_s = self._first_s[index], self._last_s[index]
            metrics.e2e.labels(name).observe(last_s - self._arrival_s)
            if choice.num_tokens > 1:
                metrics.time_per_output_token.labels(name).observe((last_s - first_s) / (choice.num_tokens - 1))
            self._observe_stages(choice.stream.timeline.stages())
        self._log(choices)

    def _observe_stages(self, stages: dict[Stage, float]) -> None:
        metrics, name = self._metrics, self._metrics.model_name
        for stage, seconds in stages.items():
            metrics.stage.labels(name, stage.value).observe(seconds)
        metrics.queue_time.labels(name).observe(
            stages[Stage.QUEUE_PREFILL] + stages[Stage.HAND_OVER_WAIT] + stages[Stage.QUEUE_DECODE]
        )
        metrics.prefill_time.labels(name).observe(stages[Stage.PREFILL])
        metrics.decode_time.labels(name).observe(stages[Stage.FIRST_DECODE] + stages[Stage.DECODE])

    def _log(self, choices: Sequence[Choice]) -> None:
        ttft_s = min(self._first_s.values(), default=self._clock.now()) - self._arrival_s
        reasons = ",".join(
            choice.finish_reason.value if choice.finish_reason is not None else "abort" for choice in choices
        )
        logger.info(
            "%s %s: %d prompt tokens, %d answer tokens, TTFT %.1f ms, whole %.1f ms",
            self._response_id,
            reasons,
            self._num_prompt_tokens,
            sum(choice.num_tokens for choice in choices),
            ttft_s * 1e3,
            (self._clock.now() - self._arrival_s) * 1e3,
        )


class InstanceCollector(Collector):
    """Reads the instances' load reports when scraped."""

    def __init__(self, router: Router, model_name: str) -> None:
        self._router = router
        self._model_name = model_name

    def collect(self) -> Iterable[Metric]:
        """Yield gauges and counters, one sample for each instance."""
        instances = self._router.instances()
        yield self._gauge("disagg:instance_up", "1 while an instance takes requests", instances, _is_up)
        yield self._counter("disagg:instance_restarts", "Restarts", instances, lambda status: status.num_restarts)
        for name, text, of_load in _LOAD_GAUGES:
            yield self._gauge(name, text, instances, _of_load(of_load))
        for name, text, of_load in _LOAD_COUNTERS:
            yield self._counter(name, text, instances, _of_load(of_load))
        yield self._blocks(instances)

    def _gauge(self, name: str, text: str, instances: Sequence[InstanceStatus], read: _Read) -> Metric:
        family = GaugeMetricFamily(name, text, labels=("model_name", "instance", "role"))
        return self._fill(family, instances, read)

    def _counter(self, name: str, text: str, instances: Sequence[InstanceStatus], read: _Read) -> Metric:
        family = CounterMetricFamily(name, text, labels=("model_name", "instance", "role"))
        return self._fill(family, instances, read)

    def _fill(
        self,
        family: GaugeMetricFamily | CounterMetricFamily,
        instances: Sequence[InstanceStatus],
        read: _Read,
    ) -> Metric:
        for status in instances:
            family.add_metric((self._model_name, status.instance, status.role.value), float(read(status)))
        return family

    def _blocks(self, instances: Sequence[InstanceStatus]) -> Metric:
        labels = ("model_name", "instance", "role", "state")
        family = GaugeMetricFamily("disagg:kv_blocks", "KV blocks by state; they add up to the pool", labels=labels)
        for status in instances:
            for state in _BLOCK_STATES:
                values = (self._model_name, status.instance, status.role.value, state)
                family.add_metric(values, float(getattr(status.load, f"blocks_{state}")))
        return family


def _of_load(read: _OfLoad) -> _Read:
    return lambda status: read(status.load)


def _is_up(status: InstanceStatus) -> float:
    return float(status.state is InstanceState.READY)


def kv_usage(load: InstanceLoad) -> float:
    """Return the share of KV blocks that are held; cached ones can be had at any time."""
    held = load.blocks_total - load.blocks_free - load.blocks_cached
    return held / load.blocks_total if load.blocks_total else 0.0


_LOAD_GAUGES: Final[tuple[tuple[str, str, _OfLoad], ...]] = (
    ("vllm:num_requests_running", "Sequences in the running batch", lambda load: load.num_running),
    (
        "vllm:num_requests_waiting",
        "Sequences that wait for blocks, a place, or their KV",
        lambda load: load.num_waiting,
    ),
    ("vllm:kv_cache_usage_perc", "Share of KV blocks held (1 is full)", kv_usage),
    ("disagg:kv_leases", "Handed-over sequences whose blocks wait to be pulled", lambda load: load.num_leases),
)
_LOAD_COUNTERS: Final[tuple[tuple[str, str, _OfLoad], ...]] = (
    ("vllm:num_preemptions", "Sequences computed again for want of blocks", lambda load: load.num_preemptions_total),
    ("vllm:prefix_cache_queries", "Prompt tokens looked up", lambda load: load.num_prefix_queries_total),
    ("vllm:prefix_cache_hits", "Prompt tokens found", lambda load: load.num_prefix_hits_total),
    ("disagg:steps", "Model steps", lambda load: load.num_steps_total),
    ("disagg:prefill_tokens", "Tokens computed in prefill", lambda load: load.num_prefill_tokens_total),
    ("disagg:decode_tokens", "Tokens computed in decode", lambda load: load.num_decode_tokens_total),
    ("disagg:kv_leases_expired", "Leases that nobody used", lambda load: load.num_leases_expired_total),
)
