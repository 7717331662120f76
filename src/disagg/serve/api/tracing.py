"""Traces of requests for OpenTelemetry collectors (``--otlp-endpoint``).

One span for the request, under it one for each stage of ``measure.timeline`` that took time, so that the spans add up
to what ``/requests`` shows; a request of several choices has a span for each between the two. They are made from the
timeline when a choice ends: nothing is measured twice, and instances take no part. Names of attributes are those of
OpenTelemetry's conventions for generative AI where there is one.

Needs the extra ``disagg[otlp]``; only a server that was given an endpoint imports this file.
"""

import time
from collections.abc import Mapping
from typing import Final
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Scope, Send

from disagg import __version__
from disagg.base.errors import http_status
from disagg.base.sampling import FinishReason
from disagg.measure.timeline import Stage
from disagg.serve.api.failures import as_disagg_error
from disagg.serve.api.views import RequestView

MAX_WAITING: Final = 4096
"""Spans that wait for the collector; what is over is dropped, and the exporter's log says so."""
EXPORT_S: Final = 5.0
"""What the collector gets to take a batch, also when the server ends."""

_OPERATIONS: Final = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion", "/v1/responses": "chat"}
_ON_PREFILL: Final = frozenset({Stage.QUEUE_PREFILL, Stage.PREFILL})
_PROPAGATOR: Final = TraceContextTextMapPropagator()


class Traces:
    """Where requests go as traces: to an OTLP collector, in a thread, in batches. ``close`` sends what is left."""

    def __init__(self, endpoint: str, ratio: float, model_name: str) -> None:
        """``endpoint`` is a collector's URL (``/v1/traces`` where it has no path). Of requests whose client sends no
        ``traceparent``, the share ``ratio`` is traced; else the client's flag decides.
        """
        exporter = OTLPSpanExporter(endpoint=_traces_url(endpoint), timeout=EXPORT_S)
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "disagg", "service.version": __version__}),
            sampler=ParentBased(TraceIdRatioBased(ratio)),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(
                exporter, max_queue_size=MAX_WAITING, export_timeout_millis=EXPORT_S * 1e3, schedule_delay_millis=1e3
            )
        )
        self._tracer = self._provider.get_tracer("disagg", __version__)
        self._model_name = model_name

    def begin(self, scope: Scope) -> "RequestTrace":
        """Begin the trace of a request that has just arrived; one that is not sampled costs next to nothing."""
        operation = _OPERATIONS[scope["path"]]
        start_ns = time.time_ns()
        span = self._tracer.start_span(
            f"{operation} {self._model_name}",
            context=_PROPAGATOR.extract(Headers(scope=scope)),
            kind=SpanKind.SERVER,
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "disagg",
                "gen_ai.request.model": self._model_name,
                "disagg.request_id": scope["state"]["request_id"],
            },
            start_time=start_ns,
        )
        return RequestTrace(self._tracer, span, start_ns)

    def flush(self) -> None:
        """Send the spans that wait, for ``EXPORT_S`` at most."""
        self._provider.force_flush(int(EXPORT_S * 1e3))

    def close(self) -> None:
        """Send the spans that wait, and end the thread."""
        self.flush()
        self._provider.shutdown()


class RequestTrace:
    """The trace of one request under way."""

    def __init__(self, tracer: Tracer, span: Span, start_ns: int) -> None:
        self._tracer = tracer
        self._span = span
        self._start_ns = start_ns

    def announced(self, send: Send) -> Send:
        """Return a ``send`` that tells the client the request's span, as ``traceparent``."""
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, set_span_in_context(self._span))

        async def send_with_span(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(carrier)
            await send(message)

        return send_with_span

    def choice_ended(self, view: RequestView, num_choices: int) -> None:
        """Add the stages that a choice has passed."""
        if not self._span.is_recording():
            return
        if view.finish_reason == FinishReason.ERROR.value:
            self._span.set_status(Status(StatusCode.ERROR, view.error))
        if num_choices == 1:
            self._span.set_attributes(_attributes(view))
            self._add_stages(self._span, view)
            return
        span = self._start(f"choice {view.choice}", self._span, self._start_ns, _attributes(view))
        span.end(self._add_stages(span, view))

    def failed(self, error: Exception) -> None:
        """Note what the request was refused with, or ended by."""
        failure = as_disagg_error(error)
        self._span.set_status(Status(StatusCode.ERROR, str(failure)))
        self._span.set_attributes(
            {"error.type": type(error).__name__, "http.response.status_code": http_status(failure)}
        )

    def end(self) -> None:
        """End the request's span now."""
        self._span.end()

    def _add_stages(self, parent: Span, view: RequestView) -> int:
        """Add a span for each stage that took time; return the end of the last one, in nanoseconds."""
        begin_ns = self._start_ns
        for stage in Stage:
            end_ns = begin_ns + round(view.stages.get(stage.value, 0.0) * 1e9)
            if end_ns > begin_ns:
                instance = view.prefill_instance if stage in _ON_PREFILL else view.decode_instance
                attributes = {"disagg.instance": instance} if instance is not None else {}
                self._start(stage.value, parent, begin_ns, attributes).end(end_ns)
            begin_ns = end_ns
        return begin_ns

    def _start(self, name: str, parent: Span, start_ns: int, attributes: Mapping[str, str | int | float]) -> Span:
        return self._tracer.start_span(
            name, context=set_span_in_context(parent), attributes=dict(attributes), start_time=start_ns
        )


def _attributes(view: RequestView) -> dict[str, str | int | float]:
    attributes: dict[str, str | int | float | None] = {
        "gen_ai.usage.input_tokens": view.num_prompt_tokens,
        "gen_ai.usage.output_tokens": view.num_output_tokens,
        "gen_ai.usage.cache_read.input_tokens": view.num_cached_tokens,
        "gen_ai.response.finish_reasons": view.finish_reason,
        "gen_ai.server.time_to_first_token": view.ttft_s,
        "gen_ai.server.time_per_output_token": view.tpot_s,
        "disagg.prefill_instance": view.prefill_instance,
        "disagg.decode_instance": view.decode_instance,
    }
    return {name: value for name, value in attributes.items() if value is not None}


def _traces_url(endpoint: str) -> str:
    return endpoint.rstrip("/") + "/v1/traces" if urlsplit(endpoint).path in ("", "/") else endpoint
