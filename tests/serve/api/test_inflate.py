"""Compressed bodies: opened as they come, with the bound of those that are not."""

import gzip
import json
from typing import Any

import pytest
from api_site import ANSWER, Serve
from hypothesis import given
from hypothesis import strategies as st

from disagg.serve.api.http import MAX_BODY_BYTES, read_body
from disagg.serve.api.inflate import _Opened

BODY = json.dumps({"model": "tiny", "prompt": "x", "max_tokens": 80}).encode()
GZIP = {"content-encoding": "gzip"}


async def test_a_compressed_body_is_served(serve: Serve) -> None:
    site = await serve(api_key="one", further_keys=("two",))
    for key in ("one", "two"):
        headers = {**GZIP, "authorization": f"Bearer {key}"}
        response = await site.http.post("/v1/completions", content=gzip.compress(BODY, mtime=0), headers=headers)
        assert response.json()["choices"][0]["text"] == ANSWER


@pytest.mark.parametrize(
    ("content", "encoding", "status", "words"),
    [
        (BODY, "gzip", 400, "is no gzip"),
        (gzip.compress(BODY, mtime=0)[:-9], "gzip", 400, "ends before its gzip does"),
        (gzip.compress(BODY, mtime=0) + b"x", "gzip", 400, "goes on after the end"),
        (b"", "gzip", 400, "ends before"),
        (BODY, "br", 415, "'Content-Encoding: br' is not supported"),
        (gzip.compress(bytes(MAX_BODY_BYTES + 1)), "gzip", 413, f"longer than {MAX_BODY_BYTES}"),
    ],
)
async def test_what_cannot_be_opened_is_refused(
    serve: Serve, content: bytes, encoding: str, status: int, words: str
) -> None:
    site = await serve()
    response = await site.http.post("/v1/completions", content=content, headers={"content-encoding": encoding})
    assert response.status_code == status
    assert words in response.json()["error"]["message"]


@given(data=st.binary(max_size=300), repeats=st.integers(1, 4000), cut=st.integers(1, 500))
async def test_any_body_arrives_as_it_was(data: bytes, repeats: int, cut: int) -> None:
    compressed = gzip.compress(data * repeats, mtime=0)
    parts = [compressed[start : start + cut] for start in range(0, len(compressed), cut)]
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    messages.append({"type": "http.request", "body": b"", "more_body": False})

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    assert await read_body(_Opened(receive)) == data * repeats
