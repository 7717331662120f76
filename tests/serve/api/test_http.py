"""Plain HTTP: disconnects, small endpoints, malformed bodies, metrics."""

import asyncio

import httpx
import pytest
from api_site import Serve
from prometheus_client.parser import text_string_to_metric_families

BODY = {"model": "tiny", "prompt": "x", "max_tokens": 100, "ignore_eos": True}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_tokens_before", [0, 2])
async def test_a_client_that_goes_away_aborts_all_its_sequences(
    serve: Serve, stream: bool, num_tokens_before: int
) -> None:
    gate = asyncio.Semaphore(num_tokens_before)
    site = await serve(script=lambda _: [5] * 200, gate=gate)
    async with httpx.AsyncClient() as client:
        asking = asyncio.create_task(client.post(f"{site.url}/v1/completions", json={**BODY, "n": 2, "stream": stream}))
        async with asyncio.timeout(20):
            while len(site.router.requests) < 2 or gate.locked() is False:
                await asyncio.sleep(0)
        asking.cancel()
        async with asyncio.timeout(20):
            while len(set(site.router.aborted)) < 2:
                site.router.aborting.clear()
                await site.router.aborting.wait()
    assert set(site.router.aborted) == {request.request_id for request in site.router.requests}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b"{}", "missing parameter 'prompt'"),
        (b'{"prompt": []}', "empty list"),
        (b'{"prompt": ["a", 5]}', "mixes"),
        (b'{"prompt": [99999999]}', "outside the vocabulary"),
        (b'{"prompt": ""}', "no tokens"),
        (b'{"prompt": "x", "stream_options": {"foo": 1}}', "unknown parameter 'stream_options.foo'"),
        (b'{"prompt": "\xff"}', "body"),
    ],
)
async def test_a_malformed_body_is_refused_in_openai_shape(serve: Serve, body: bytes, words: str) -> None:
    site = await serve()
    async with httpx.AsyncClient() as client:
        response = await client.post(f"{site.url}/v1/completions", content=body)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]


async def test_a_client_own_request_id_is_echoed_and_never_a_key(serve: Serve) -> None:
    site = await serve()
    async with httpx.AsyncClient() as client:
        for _ in range(2):
            response = await client.post(f"{site.url}/v1/completions", json=BODY, headers={"X-Request-Id": "mine"})
            assert response.headers["x-request-id"] == "mine"
    ids = [request.request_id for request in site.router.requests]
    assert len(set(ids)) == 2
    assert not any("mine" in one for one in ids)


async def test_tokenize_and_detokenize_are_inverse(serve: Serve) -> None:
    site = await serve()
    async with httpx.AsyncClient(base_url=site.url) as client:
        there = (await client.post("/tokenize", json={"prompt": "Größe 10 €", "return_token_strs": True})).json()
        back = (await client.post("/detokenize", json={"tokens": there["tokens"]})).json()
        chat = (await client.post("/tokenize", json={"messages": [{"role": "user", "content": "Hi"}]})).json()
    assert back["prompt"] == "Größe 10 €"
    assert there["count"] == len(there["token_strs"])
    assert chat["count"] > there["count"] - 5


async def test_small_endpoints(serve: Serve) -> None:
    site = await serve()
    down = await serve(live=False)
    async with httpx.AsyncClient() as client:
        assert (await client.get(f"{site.url}/health")).status_code == 200
        assert (await client.get(f"{site.url}/ready")).status_code == 200
        refused = await client.get(f"{down.url}/ready")
        assert refused.status_code == 503
        assert "no live prefill and no live decode instance" in refused.json()["error"]["message"]
        assert "disagg" in (await client.get(f"{site.url}/")).text
        assert (await client.get(f"{site.url}/status")).json()["instances"][0]["kv_usage"] == 0.25
        assert (await client.get(f"{site.url}/nowhere")).status_code == 404
        assert (await client.get(f"{site.url}/v1/completions")).status_code == 405
        assert (await client.get(f"{site.url}/v1/models/tiny")).json()["id"] == "tiny"


async def test_metrics_have_vllm_names(serve: Serve) -> None:
    site = await serve()
    async with httpx.AsyncClient() as client:
        await client.post(f"{site.url}/v1/completions", json={**BODY, "max_tokens": 3})
        text = (await client.get(f"{site.url}/metrics")).text
    samples = {
        sample.name: sample.value for family in text_string_to_metric_families(text) for sample in family.samples
    }
    assert samples["vllm:generation_tokens_total"] == 3
    assert samples["vllm:time_to_first_token_seconds_count"] == 1
    assert samples["vllm:inter_token_latency_seconds_count"] == 2
    assert samples["vllm:request_success_total"] == 1
    assert samples["vllm:num_requests_running"] == 2
    assert samples["vllm:kv_cache_usage_perc"] == 0.25
    assert "disagg:hand_over_bytes_total" in samples
