"""What Prometheus reads, and the log line of each request."""

import asyncio
import logging
import math

import pytest
from api_site import Serve, ids_of
from msgspec import structs
from prometheus_client.parser import text_string_to_metric_families

from disagg.base.errors import UnavailableError
from disagg.base.ids import InstanceId
from disagg.measure.timeline import RequestTimeline
from disagg.scheduling.router.outputs import DropReason, HandOverEnded
from disagg.serve.api.metrics import ServerMetrics
from disagg.serve.router.sink import RouterSink

BODY = {"prompt": "x", "max_tokens": 3}


def value(metrics: ServerMetrics, name: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(name, {"model_name": "tiny", **labels}) or 0.0


async def test_a_request_is_counted_under_vllms_names(serve: Serve) -> None:
    site = await serve()
    await site.http.post("/v1/completions", json={**BODY, "n": 2})
    assert await site.metric("vllm:generation_tokens_total") == 6
    assert await site.metric("vllm:prompt_tokens_total") == len(site.router.requests[0].prompt_token_ids)
    assert await site.metric("vllm:time_to_first_token_seconds_count") == 2
    assert await site.metric("vllm:inter_token_latency_seconds_count") == 4
    assert await site.metric("vllm:request_time_per_output_token_seconds_count") == 2
    assert await site.metric("vllm:e2e_request_latency_seconds_count") == 2
    assert await site.metric("vllm:request_success_total", finished_reason="length") == 2
    for name in ("queue", "prefill", "decode", "inference"):
        assert await site.metric(f"vllm:request_{name}_time_seconds_count") == 2, name


async def test_instances_are_read_when_scraped(serve: Serve) -> None:
    site = await serve()
    for role in ("prefill", "decode"):
        labels = {"model_name": "tiny", "instance": f"{role}-0", "role": role}
        assert await site.metric("vllm:num_requests_running", **labels) == 2
        assert await site.metric("vllm:kv_cache_usage_perc", **labels) == 0.25
        assert await site.metric("disagg:kv_blocks", **labels) == 100
        assert await site.metric("disagg:kv_blocks", **labels, state="active") == 25
        assert await site.metric("disagg:instance_up", **labels) == 1
    names = {family.name for family in text_string_to_metric_families((await site.http.get("/metrics")).text)}
    expected = {"num_requests_waiting", "num_preemptions", "prefix_cache_queries", "prefix_cache_hits"}
    assert {f"vllm:{name}" for name in expected} <= names


async def test_errors_inside_streams_are_counted_too(serve: Serve) -> None:
    site = await serve(lambda _: ids_of("a"), error=UnavailableError("gone"))
    response = await site.http.post("/v1/completions", json={**BODY, "stream": True})
    assert response.status_code == 200
    await site.wait_for_metric("vllm:request_success_total", 1, finished_reason="error")
    assert await site.metric("disagg:error_responses_total", status="503") == 1


async def test_errors_are_counted_by_status(serve: Serve) -> None:
    site = await serve(lambda _: [], error=UnavailableError("gone"))
    await site.http.post("/v1/completions", json=BODY)
    await site.http.post("/v1/completions", json={"prompt": 5})
    assert await site.metric("disagg:error_responses_total", status="503") == 1
    assert await site.metric("disagg:error_responses_total", status="400") == 1
    assert await site.metric("vllm:request_success_total", finished_reason="error") == 1


def test_the_router_counts_hand_overs_drops_and_deaths() -> None:
    metrics = ServerMetrics("tiny")
    sink: RouterSink = metrics
    prefill, decode = InstanceId("prefill-0"), InstanceId("decode-0")
    done = HandOverEnded(
        source=prefill, target=decode, num_bytes=1000, duration_s=0.002, failure="", link="shm", num_repeated=3
    )
    sink.hand_over_ended(done)
    assert value(metrics, "disagg:kv_link", source="prefill-0", target="decode-0", link="shm") == 1
    sink.hand_over_ended(structs.replace(done, num_bytes=0, failure="the lease expired", num_repeated=1))
    sink.hand_over_ended(structs.replace(done, num_bytes=0, link="tcp", num_repeated=0))
    assert value(metrics, "disagg:kv_link", source="prefill-0", target="decode-0", link="tcp") == 1
    assert b'link="shm"' not in metrics.exposition()  # what carried them before is not shown any more
    assert value(metrics, "disagg:kv_blocks_repeated_total") == 4
    sink.message_dropped(decode, DropReason.STALE)
    sink.instance_lost(decode)
    assert value(metrics, "disagg:hand_over_bytes_total") == 1000
    assert value(metrics, "disagg:hand_over_seconds_count") == 2
    assert value(metrics, "disagg:hand_over_failures_total") == 1
    assert value(metrics, "disagg:dropped_messages_total", instance="decode-0", reason="stale") == 1
    assert b'disagg:instance_losses_total{instance="decode-0",model_name="tiny"} 1.0' in metrics.exposition()


def test_the_stages_add_up_to_the_whole() -> None:
    metrics = ServerMetrics("tiny")
    timeline = RequestTimeline(
        arrival_s=10.0,
        prefill_started_s=11.0,
        first_token_s=13.0,
        offered_s=13.25,
        pull_started_s=13.5,
        pulled_s=14.0,
        decode_started_s=14.25,
        second_token_s=14.5,
        last_token_s=17.0,
        finished_s=17.5,
    )
    metrics.stages_passed(timeline)
    stages = [
        sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "disagg:request_stage_seconds_sum"
    ]
    assert math.isclose(sum(stages), 7.5)
    assert value(metrics, "vllm:request_queue_time_seconds_sum") == 1.0
    assert value(metrics, "vllm:request_prefill_time_seconds_sum") == 2.0
    assert value(metrics, "vllm:request_decode_time_seconds_sum") == 4.0
    assert value(metrics, "vllm:request_inference_time_seconds_sum") == 6.0


async def test_each_request_leaves_one_line_with_its_tokens_and_times(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    site = await serve()
    with caplog.at_level(logging.INFO, "disagg.serve.api"):
        response = await site.http.post("/v1/completions", json=BODY, headers={"X-Request-Id": "mine"})
        async with asyncio.timeout(20):
            while not caplog.records:
                await asyncio.sleep(0)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"{response.json()['id']} request_id=mine finished=length choices=1 prompt_tokens=2 ")
    assert "answer_tokens=3 ttft_ms=" in line
