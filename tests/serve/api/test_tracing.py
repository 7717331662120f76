"""Traces of requests, read by a collector that speaks OTLP over HTTP."""

import asyncio
import queue
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from api_site import Serve
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from disagg.base.config import ServeSettings
from disagg.base.errors import ConfigurationError
from disagg.serve.api.tracing import Traces

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
ROOT = "text_completion tiny"
BODY: dict[str, Any] = {"model": "tiny", "prompt": "hello", "max_tokens": 8}


class Collector:
    """What an OTLP collector received."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.spans: queue.Queue[Span] = queue.Queue()


@pytest.fixture
def collector() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            batch = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
            for resource in batch.resource_spans:
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        received.spans.put(span)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *words: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        received = Collector(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield received
        server.shutdown()
        thread.join()


@pytest.fixture
def traces(collector: Collector) -> Iterator[Traces]:
    opened = Traces(collector.url, 1.0, "tiny")
    yield opened
    opened.close()


async def taken(traces: Traces, collector: Collector, root: str = ROOT) -> dict[str, Span]:
    """Return the spans by name once that of the request has come, which ends a moment after its answer."""
    spans: dict[str, Span] = {}
    async with asyncio.timeout(20):
        while root not in spans:
            await asyncio.to_thread(traces.flush)
            while not collector.spans.empty():
                span = collector.spans.get()
                spans[span.name] = span
    return spans


def attributes(span: Span) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value") or "") for pair in span.attributes}


async def test_the_spans_of_a_request_add_up_to_its_timeline(
    serve: Serve, traces: Traces, collector: Collector
) -> None:
    site = await serve(traces=traces)
    answer = await site.http.post("/v1/completions", json=BODY, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
    shown = (await site.http.get("/requests")).json()["requests"][0]
    spans = await taken(traces, collector)

    root = spans.pop(ROOT)
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == (TRACE, PARENT)
    assert answer.headers["traceparent"] == f"00-{TRACE}-{root.span_id.hex()}-01"
    assert attributes(root)["gen_ai.usage.output_tokens"] == shown["num_output_tokens"]
    assert attributes(root)["disagg.request_id"] == answer.headers["x-request-id"]

    assert {span.parent_span_id for span in spans.values()} == {root.span_id}
    lasting = {name: seconds for name, seconds in shown["stages"].items() if seconds > 0}
    assert {name: (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9 for name, span in spans.items()} == {
        name: pytest.approx(seconds, abs=1e-6) for name, seconds in lasting.items()
    }
    starts = [span.start_time_unix_nano for span in sorted(spans.values(), key=lambda span: span.start_time_unix_nano)]
    assert starts[0] == root.start_time_unix_nano


@pytest.mark.parametrize(
    ("path", "prompt"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]}),
        ("/v1/responses", {"input": "hello"}),
    ],
)
async def test_chats_and_responses_are_traced(
    serve: Serve, traces: Traces, collector: Collector, path: str, prompt: dict[str, Any]
) -> None:
    site = await serve(traces=traces)
    answer = await site.http.post(path, json={"model": "tiny", **prompt})
    assert answer.status_code == 200
    root = (await taken(traces, collector, "chat tiny"))["chat tiny"]
    assert answer.headers["traceparent"].split("-")[2] == root.span_id.hex()


async def test_each_choice_has_a_span_of_its_own(serve: Serve, traces: Traces, collector: Collector) -> None:
    site = await serve(traces=traces)
    await site.http.post("/v1/completions", json={**BODY, "n": 2})
    spans = await taken(traces, collector)
    root = spans[ROOT]
    assert [spans[f"choice {number}"].parent_span_id for number in (0, 1)] == [root.span_id] * 2


async def test_a_refused_request_is_a_span_that_failed(serve: Serve, traces: Traces, collector: Collector) -> None:
    site = await serve(traces=traces)
    await site.http.post("/v1/completions", json={**BODY, "temperature": -1})
    root = (await taken(traces, collector))[ROOT]
    assert root.status.code == Status.STATUS_CODE_ERROR
    assert "temperature" in root.status.message
    assert attributes(root)["http.response.status_code"] == 400


async def test_the_clients_flag_decides_whether_its_request_is_traced(
    serve: Serve, traces: Traces, collector: Collector
) -> None:
    site = await serve(traces=traces)
    answer = await site.http.post("/v1/completions", json=BODY, headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
    assert answer.status_code == 200
    await site.http.post("/v1/completions", json=BODY)
    assert (await taken(traces, collector))[ROOT].trace_id.hex() != TRACE
    assert collector.spans.empty()


async def test_a_collector_that_is_away_disturbs_no_request(serve: Serve) -> None:
    away = Traces("http://127.0.0.1:1", 1.0, "tiny")
    site = await serve(traces=away)
    assert (await site.http.post("/v1/completions", json=BODY)).status_code == 200
    away.close()


def test_an_endpoint_is_a_url() -> None:
    with pytest.raises(ConfigurationError, match="--otlp-endpoint"):
        ServeSettings(otlp_endpoint="localhost:4317")
