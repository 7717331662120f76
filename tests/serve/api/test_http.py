"""Plain HTTP: keys and ids, bounds, the endpoints beside generation, the page."""

import dataclasses
import json

import httpx
import pytest
from api_site import EOS, Serve, ids_of
from scripted_router import ScriptedRouter

from disagg.base.errors import UnavailableError
from disagg.models.chat_template import ChatTemplate
from disagg.serve.api.app import OPEN_PATHS, create_app
from disagg.serve.api.metrics import ServerMetrics
from disagg.serve.api.served_model import ServedModel

BODY = {"model": "tiny", "prompt": "x", "max_tokens": 3}


async def test_events_are_spelled_as_openai_does(serve: Serve) -> None:
    site = await serve(lambda _: [*ids_of('"ß'), EOS])
    response = await site.http.post("/v1/completions", json={**BODY, "stream": True, "max_tokens": 9})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *events, done, nothing = response.text.split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    # Half a character shows nothing, so there is no event for it.
    assert [choice["text"] for choice in choices] == ['"', "ß", ""]
    assert choices[0] == {"index": 0, "text": '"', "logprobs": None, "finish_reason": None, "stop_reason": None}


async def test_an_error_inside_a_stream_is_followed_by_its_end(serve: Serve) -> None:
    site = await serve(lambda _: ids_of("ab"), error=UnavailableError("decode-0 died"))
    response = await site.http.post("/v1/completions", json={**BODY, "stream": True})
    assert response.status_code == 200
    *_, error, done, _ = response.text.split("\n\n")
    assert json.loads(error.removeprefix("data: "))["error"]["type"] == "service_unavailable_error"
    assert done == "data: [DONE]"


async def test_a_client_own_request_id_is_echoed_and_never_a_key(serve: Serve) -> None:
    site = await serve()
    for _ in range(2):
        response = await site.http.post("/v1/completions", json=BODY, headers={"X-Request-Id": "mine"})
        assert response.headers["x-request-id"] == "mine"
    ids = [request.request_id for request in site.router.requests]
    assert len(set(ids)) == 2
    assert not any("mine" in one for one in ids)


@pytest.mark.parametrize("given", ["", "x" * 129, "two words", "ünprintable".encode()])
async def test_a_request_id_that_is_none_is_replaced(serve: Serve, given: str | bytes) -> None:
    site = await serve()
    response = await site.http.get("/nowhere", headers={"X-Request-Id": given})
    assert len(response.headers["x-request-id"]) == 32


async def test_all_but_the_open_paths_want_the_key(serve: Serve) -> None:
    site = await serve(api_key="secret")
    async with httpx.AsyncClient(base_url=site.url) as stranger:
        for path in OPEN_PATHS:
            assert (await stranger.get(path)).status_code == 200, path
        for path in ("/v1/models", "/v1/models/tiny", "/status", "/requests", "/tokenize", "/nowhere"):
            response = await stranger.get(path)
            assert response.status_code == 401, path
            assert response.json()["error"]["code"] == "invalid_api_key"
        basic = await stranger.get("/v1/models", headers={"Authorization": "Basic secret"})
        assert basic.status_code == 401
    assert (await site.http.get("/v1/models")).status_code == 200


async def test_a_body_that_is_too_long_is_a_413(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disagg.serve.api.http.MAX_BODY_BYTES", 1000)
    site = await serve()
    response = await site.http.post("/v1/completions", json={**BODY, "prompt": "x" * 1000})
    assert response.status_code == 413
    assert "longer than 1000 bytes" in response.json()["error"]["message"]
    assert site.router.requests == []


async def test_unknown_paths_and_methods_are_refused_in_openais_shape(serve: Serve) -> None:
    site = await serve()
    unknown, wrong = await site.http.get("/nowhere"), await site.http.get("/v1/completions")
    assert (unknown.status_code, wrong.status_code) == (404, 405)
    assert "GET /nowhere" in unknown.json()["error"]["message"]
    assert "GET /v1/completions" in wrong.json()["error"]["message"]


async def test_tokenize_and_detokenize_are_inverse(serve: Serve) -> None:
    site = await serve()
    asked = {"prompt": "Größe 10 €", "add_special_tokens": False, "return_token_strs": True}
    there = (await site.http.post("/tokenize", json=asked)).json()
    back = (await site.http.post("/detokenize", json={"tokens": there["tokens"]})).json()
    assert back["prompt"] == "Größe 10 €"
    assert there["count"] == len(there["token_strs"]) == len("Größe 10 €".encode())
    assert there["max_model_len"] == 256


async def test_a_chat_is_tokenised_as_it_would_be_answered(serve: Serve) -> None:
    site = await serve()
    messages = [{"role": "user", "content": "Hi"}]
    tokens = (await site.http.post("/tokenize", json={"messages": messages})).json()["tokens"]
    await site.http.post("/v1/chat/completions", json={"messages": messages})
    assert tuple(tokens) == site.router.requests[0].prompt_token_ids
    refused = await site.http.post("/tokenize", json={"prompt": "x", "messages": messages})
    assert "either 'prompt' or 'messages'" in refused.json()["error"]["message"]


async def test_detokenize_refuses_what_is_no_token(serve: Serve) -> None:
    site = await serve()
    response = await site.http.post("/detokenize", json={"tokens": [999]})
    assert response.status_code == 400
    assert "999 is outside the vocabulary of 258" in response.json()["error"]["message"]


async def test_readiness_says_what_is_missing(serve: Serve) -> None:
    ready, starting = await serve(), await serve(live=False)
    assert (await ready.http.get("/ready")).json() == {"ready": True, "detail": ""}
    for path in ("/ready", "/readiness"):
        response = await starting.http.get(path)
        assert response.status_code == 503
        assert response.json()["detail"] == (
            "no prefill instance is ready: prefill-0 is starting (reading weights); "
            "no decode instance is ready: decode-0 is starting (reading weights)"
        )
    for path in ("/health", "/live", "/liveness"):
        assert (await starting.http.get(path)).status_code == 200


async def test_models_and_version(serve: Serve) -> None:
    site = await serve()
    assert (await site.http.get("/v1/models/tiny")).json()["max_model_len"] == 256
    assert (await site.http.get("/v1/models/other")).status_code == 404
    assert (await site.http.get("/version")).json()["version"].count(".") == 2
    starting = await serve(live=False)
    assert (await starting.http.get("/v1/models")).json()["data"][0]["max_model_len"] is None


async def test_status_shows_every_instance(serve: Serve) -> None:
    site = await serve()
    status = (await site.http.get("/status")).json()
    assert [one["instance"] for one in status["instances"]] == ["prefill-0", "decode-0"]
    assert status["instances"][0]["kv_usage"] == 0.25
    assert status["instances"][0]["blocks"]["active"] == 25


@pytest.mark.parametrize("source", [None, "{{ messages }}"])
async def test_status_says_whether_the_model_can_chat(served_model: ServedModel, source: str | None) -> None:
    model = dataclasses.replace(served_model, chat_template=ChatTemplate(source, {}))
    app = create_app(ScriptedRouter(lambda _: []), model, ServerMetrics("tiny"))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as http:
        assert (await http.get("/status")).json()["can_chat"] is (source is not None)


async def test_the_page_needs_nothing_from_elsewhere(serve: Serve) -> None:
    site = await serve()
    page = await site.http.get("/")
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    without_namespace = page.text.replace("http://www.w3.org/2000/svg", "")
    assert "http:" not in without_namespace
    assert "https:" not in without_namespace
    assert "<h1>disagg</h1>" in page.text
