"""Prometheus metrics: vLLM's names where one exists, so that existing dashboards and autoscalers work.

Counters and histograms are fed as requests go by; what an instance knows about itself (queues, KV blocks, steps) is
read from its last load report when ``/metrics`` is scraped (``instance_metrics``).
"""

import logging
from collections.abc import Sequence
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from disagg.base.ids import InstanceId
from disagg.base.sampling import FinishReason
from disagg.measure.timeline import RequestTimeline, Stage
from disagg.scheduling.dispatch.actions import PathEnded, RefuseReason
from disagg.scheduling.router.outputs import DropReason, HandOverEnded, LinkFound
from disagg.serve.api.elastic_metrics import ElasticCollector
from disagg.serve.api.fleet_metrics import FleetMetrics
from disagg.serve.api.instance_metrics import InstanceCollector
from disagg.serve.api.prediction_metrics import PredictionMetrics
from disagg.serve.api.token_metrics import TokenMetrics
from disagg.serve.api.views import HandOverTotals
from disagg.serve.router.interface import Router

logger = logging.getLogger(__name__)

# vLLM's buckets, with finer ones below where a small model on a CPU or a local hand-over would fall into the first.
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
STAGE_BUCKETS: Final = (0.0001, 0.0003, 0.001, 0.003, *REQUEST_BUCKETS)
COUNT_BUCKETS: Final = tuple(scale * base for scale in (1, 10, 100, 1_000, 10_000) for base in (1, 2, 5))
HAND_OVER_BUCKETS: Final = (0.0001, 0.0002, 0.0005, *TOKEN_BUCKETS)

_DECODE_STAGES: Final = (
    Stage.HAND_OVER_CONTROL,
    Stage.HAND_OVER_WAIT,
    Stage.HAND_OVER,
    Stage.QUEUE_DECODE,
    Stage.FIRST_DECODE,
    Stage.DECODE,
)


class ServerMetrics:
    """All metrics of one server; also the router's sink for what it counts.

    Of several routers none keeps the fleet: what concerns it is counted where it is kept (``FleetMetrics``).
    """

    def __init__(self, model_name: str, *, keeps_fleet: bool = True) -> None:
        self.registry = CollectorRegistry()
        self._of_instances = CollectorRegistry()
        self._of_fleet = FleetMetrics(model_name) if keeps_fleet else None
        self.hand_overs = HandOverTotals()
        self._model_name = model_name
        self._links: dict[tuple[InstanceId, InstanceId], str] = {}
        ProcessCollector(registry=self.registry)
        self._add_request_metrics()
        self._add_server_metrics()
        self.predictions = PredictionMetrics(self.registry, model_name)

    def watch(self, router: Router) -> None:
        """Export what the instances report about themselves, and how there come to be more or fewer."""
        self._of_instances.register(InstanceCollector(router, self._model_name))
        self._of_instances.register(ElasticCollector(router, self._model_name))

    def exposition(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        of_fleet = b"" if self._of_fleet is None else self._of_fleet.exposition()
        return self.of_router() + of_fleet + self.of_instances()

    def of_router(self) -> bytes:
        """Return what was counted of requests here: each of several routers has some."""
        return generate_latest(self.registry)

    def of_instances(self) -> bytes:
        """Return what is known of the instances, which is the same for all routers of a server."""
        return generate_latest(self._of_instances)

    def choice_ended(self, reason: FinishReason) -> None:
        """Count one choice by how it ended."""
        self._ended[reason].inc()

    def error_shown(self, status: int) -> None:
        """Count one error that a client was shown, by its HTTP status."""
        self._errors.labels(self._model_name, str(status)).inc()

    def stages_passed(self, timeline: RequestTimeline) -> None:
        """Account for the stages of one sequence that has ended well.

        As in vLLM, the queue is what comes before the first step, and decode lasts from the first to the last token.
        """
        stages = timeline.stages()
        for stage, seconds in stages.items():
            self._stage[stage].observe(seconds)
        decode_s = sum(stages[stage] for stage in _DECODE_STAGES)
        self.queue_time.observe(stages[Stage.QUEUE_PREFILL])
        self.prefill_time.observe(stages[Stage.PREFILL])
        self.decode_time.observe(decode_s)
        self.inference_time.observe(stages[Stage.PREFILL] + decode_s)

    # RouterSink -------------------------------------------------------------------------------------------------

    def hand_over_ended(self, ended: HandOverEnded) -> None:
        """Count one pull; a failed one is also logged, since it makes a request slower without failing it."""
        self._repeated_blocks.inc(ended.num_repeated)
        if ended.failure:
            logger.warning("%s could not pull KV blocks from %s: %s", ended.target, ended.source, ended.failure)
            self._hand_over_failures.inc()
            self.hand_overs.num_failures_total += 1
            return
        self.hand_overs.num_total += 1
        self.hand_overs.bytes_total += ended.num_bytes
        self.hand_overs.seconds_total += ended.duration_s
        self._hand_over.observe(ended.duration_s)
        self._hand_over_bytes.inc(ended.num_bytes)
        if ended.link:
            self._note_link(ended.source, ended.target, ended.link)

    def link_found(self, found: LinkFound) -> None:
        """See FleetMetrics."""
        if self._of_fleet is not None:
            self._of_fleet.link_found(found)

    def _note_link(self, source: InstanceId, target: InstanceId, link: str) -> None:
        """Show what carries the blocks from one instance to another, and nothing that did before."""
        known = self._links.get((source, target))
        if known != link:
            if known is not None:
                self._kv_link.remove(self._model_name, source, target, known)
            self._links[source, target] = link
            self._kv_link.labels(self._model_name, source, target, link).set(1)

    def sequence_refused(self, reason: RefuseReason, priority: int, service_class: str) -> None:
        """Count a sequence that was not taken."""
        self.predictions.refused(reason, priority, service_class)

    def sequence_degraded(self, service_class: str) -> None:
        """Count a sequence that is served as best effort."""
        self.predictions.degraded(service_class)

    def path_ended(self, ended: PathEnded) -> None:
        """Account for a sequence that went by predictions."""
        self.predictions.add(ended)

    def message_dropped(self, instance: InstanceId, reason: DropReason) -> None:
        """Count a message that was not used."""
        self._dropped_messages.labels(self._model_name, instance, reason.value).inc()

    def instance_lost(self, instance: InstanceId) -> None:
        """See FleetMetrics."""
        if self._of_fleet is not None:
            self._of_fleet.instance_lost(instance)

    def sequence_resumed(self) -> None:
        """Count a sequence that goes on elsewhere."""
        self._resumed.inc()

    def sequence_migrated(self) -> None:
        """Count a running sequence that is handed over."""
        self._migrated.inc()

    def pause_ended(self, pause_s: float) -> None:
        """Account for the pause of a resumed sequence."""
        self._pause.observe(pause_s)

    # Definitions ------------------------------------------------------------------------------------------------

    def _add_request_metrics(self) -> None:
        histogram, counter = self._histogram, self._counter
        self.prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens of requests that got a first token")
        self.tokens = TokenMetrics(self._model_name, TOKEN_BUCKETS)
        self.registry.register(self.tokens)
        self.ttft = histogram("vllm:time_to_first_token_seconds", "Arrival to first token", TTFT_BUCKETS)
        self.time_per_output_token = histogram(
            "vllm:request_time_per_output_token_seconds", "(last - first token) / (tokens - 1)", TOKEN_BUCKETS
        )
        self.e2e = histogram("vllm:e2e_request_latency_seconds", "Arrival to last token", REQUEST_BUCKETS)
        self.queue_time = histogram("vllm:request_queue_time_seconds", "Before the first step", REQUEST_BUCKETS)
        self.prefill_time = histogram("vllm:request_prefill_time_seconds", "First step to first token", REQUEST_BUCKETS)
        self.decode_time = histogram("vllm:request_decode_time_seconds", "First to last token", REQUEST_BUCKETS)
        self.inference_time = histogram("vllm:request_inference_time_seconds", "First step to end", REQUEST_BUCKETS)
        self.num_prompt_tokens = histogram("vllm:request_prompt_tokens", "Prompt tokens of a choice", COUNT_BUCKETS)
        self.num_generation_tokens = histogram("vllm:request_generation_tokens", "Tokens of a choice", COUNT_BUCKETS)

    def _add_server_metrics(self) -> None:
        name, labels = self._model_name, self._labels
        stage = Histogram(
            "disagg:request_stage_seconds",
            "Seconds of each stage; they add up to the end-to-end time",
            labels("stage"),
            registry=self.registry,
            buckets=STAGE_BUCKETS,
        )
        self._stage = {one: stage.labels(name, one.value) for one in Stage}
        ended = Counter(
            "vllm:request_success", "Choices that ended, by how", labels("finished_reason"), registry=self.registry
        )
        self._ended = {reason: ended.labels(name, reason.value) for reason in FinishReason}
        self._errors = Counter(
            "disagg:error_responses", "Errors that clients were shown", labels("status"), registry=self.registry
        )
        self._hand_over = self._histogram("disagg:hand_over_seconds", "Seconds of one KV pull", HAND_OVER_BUCKETS)
        self._hand_over_bytes = self._counter("disagg:hand_over_bytes", "KV bytes pulled")
        self._hand_over_failures = self._counter("disagg:hand_over_failures", "KV pulls that did not succeed")
        self._repeated_blocks = self._counter(
            "disagg:kv_blocks_repeated", "KV blocks that came with a wrong digest and were pulled again"
        )
        self._kv_link = Gauge(
            "disagg:kv_link",
            "1 for what carries KV blocks from one instance to another",
            labels("source", "target", "link"),
            registry=self.registry,
        )
        self._dropped_messages = Counter(
            "disagg:dropped_messages",
            "Messages of instances not used",
            labels("instance", "reason"),
            registry=self.registry,
        )
        self._resumed = self._counter("disagg:sequences_resumed", "Sequences that lost their instance and went on")
        self._migrated = self._counter(
            "disagg:sequences_migrated", "Running sequences that another instance was given with their KV blocks"
        )
        self._pause = self._histogram(
            "disagg:resume_pause_seconds", "Loss of the instance to the next token", REQUEST_BUCKETS
        )

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, self._labels(), registry=self.registry).labels(self._model_name)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, text, self._labels(), registry=self.registry, buckets=buckets).labels(self._model_name)

    def _labels(self, *more: str) -> tuple[str, ...]:
        return ("model_name", *more)
