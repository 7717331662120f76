"""Values that once were faults of ours, or could forge a line of the log: each gets a 400 or 404 and one line."""

import logging
from urllib.parse import quote

import pytest
from api_site import Serve

FORGED = "x\n12:00:00 ERROR disagg: forged\x1b[2J"


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "x", "logit_bias": {"' + b"1" * 5000 + b'": 1}}',
        b'{"prompt": "x", "max_tokens": "\xff"}',
        b'{"prompt": "x", "stop": [1, "\xff"]}',
        b'{"prompt": "x", "\xff": 1}',
        b'{"prompt": "x", "tools": "\xff"}',
        b'{"prompt": "x", "max_tokens": "\\ud800"}',
        b'{"prompt": "\\ud800", "max_tokens": 2}',
        b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"prompt": "x", "seed": 1e400}',
        b'{"prompt": "x", "temperature": 1e400}',
        b'{"prompt": "x", "tools": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": ' + b"[" * 100_000,
        b'\xff\xfe{\x00"\x00',
        b"",
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
async def test_strange_bodies_are_400(serve: Serve, caplog: pytest.LogCaptureFixture, path: str, body: bytes) -> None:
    site = await serve()
    if path == "/v1/chat/completions":
        body = body.replace(b'"prompt": "x"', b'"messages": [{"role": "user", "content": "x"}]')
    elif path == "/detokenize":
        body = body.replace(b'"prompt": "x"', b'"tokens": [1]')
    response = await site.http.post(path, content=body)
    assert response.status_code == 400, response.text
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("query", ["after=" + "9" * 6000, "after=-" + "9" * 3000, "limit=" + "9" * 3000, "after=%ff"])
async def test_strange_queries_are_400_or_answered(serve: Serve, query: str) -> None:
    site = await serve()
    assert (await site.http.get(f"/requests?{query}")).status_code in (200, 400)


async def test_nothing_that_a_client_sends_forges_a_line_of_the_log(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    site = await serve()
    with caplog.at_level(logging.DEBUG, "disagg"):
        asked = {"model": FORGED, "prompt": "x"}
        assert (await site.http.post("/v1/completions", json=asked)).status_code == 404
        assert (await site.http.get(f"/v1/models/{quote(FORGED)}")).status_code == 404
        assert (await site.http.get(f"/{quote(FORGED)}")).status_code == 404
        assert (await site.http.get("/requests", params={"after": FORGED})).status_code == 400
        assert (await site.http.post("/v1/completions", json={"prompt": "x", FORGED: 1})).status_code == 400
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("disagg")]
    assert len(messages) == 5
    assert all("forged" in message and message.isprintable() for message in messages)
