"""Tokens that go to the client without a task in between: the same answer, in order, whichever way each goes."""

import itertools
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from api_site import ANSWER, Serve, ids_of

from disagg.serve.launch.http_connection import ChunkWriter

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Three rivers?"}]}
NUM_TOKENS = len(ids_of(ANSWER)) + 1


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What was written directly."""
    parts: list[bytes] = []
    write = ChunkWriter.write

    def note(writer: ChunkWriter, body: bytes) -> None:
        parts.append(body)
        write(writer, body)

    monkeypatch.setattr(ChunkWriter, "write", note)
    return parts


async def streamed(serve: Serve, **fields: Any) -> str:
    site = await serve()
    asked = {**CHAT, "stream_options": {"include_usage": True}, **fields}
    chunks = [chunk async for chunk in await site.client.chat.completions.create(**asked, stream=True)]
    assert chunks[-1].usage.completion_tokens == NUM_TOKENS
    assert await site.metric("vllm:generation_tokens_total") == NUM_TOKENS
    return "".join(chunk.choices[0].delta.content for chunk in chunks if chunk.choices)


async def test_nearly_all_tokens_go_directly(serve: Serve, written: list[bytes]) -> None:
    assert await streamed(serve) == ANSWER
    assert len(written) > NUM_TOKENS // 2


@pytest.mark.parametrize("pattern", [(True, False), (False, True, True), (False,)])
async def test_a_client_that_is_slow_at_times_gets_all_in_order(
    serve: Serve, written: list[bytes], monkeypatch: pytest.MonkeyPatch, pattern: tuple[bool, ...]
) -> None:
    is_fast: Iterator[bool] = itertools.cycle(pattern)
    is_ready = ChunkWriter.is_ready
    monkeypatch.setattr(ChunkWriter, "is_ready", lambda writer: next(is_fast) and is_ready(writer))
    assert await streamed(serve) == ANSWER
    assert bool(written) == any(pattern)


async def test_a_fault_there_ends_the_stream_that_has_it(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("a fault")

    monkeypatch.setattr(ChunkWriter, "write", fail)
    site = await serve()
    stream = await site.client.chat.completions.create(**CHAT, stream=True)
    with pytest.raises(openai.APIError):
        _ = [chunk async for chunk in stream]
