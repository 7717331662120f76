"""A client that goes away takes its sequences along, whatever state they are in."""

import asyncio
import contextlib
import json
import logging

import pytest
from api_site import Serve, Site, ids_of

from disagg.serve.api.disconnect import ClientDisconnectedError
from disagg.serve.api.http import EventStream

FOREVER = ids_of("x") * 250


async def connect(
    site: Site, body: bytes, length: int | None = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send a request by hand, so that the connection can be dropped at any moment."""
    host, port = site.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {length or len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await writer.drain()
    return reader, writer


def asking(stream: bool) -> bytes:
    return json.dumps({"prompt": "x", "n": 2, "max_tokens": 200, "ignore_eos": True, "stream": stream}).encode()


@pytest.mark.parametrize("stream", [False, True])
async def test_before_the_first_token(serve: Serve, stream: bool) -> None:
    site = await serve(lambda _: FOREVER, gate=asyncio.Semaphore(0))
    _, writer = await connect(site, asking(stream))
    await site.router.wait_for(num_requests=2)
    writer.close()
    await site.router.wait_for(num_aborted=2)
    assert sorted(site.router.aborted) == sorted(request.request_id for request in site.router.requests)


async def test_in_the_middle_of_a_stream(serve: Serve) -> None:
    site = await serve(lambda _: FOREVER, gate=asyncio.Semaphore(6))
    reader, writer = await connect(site, asking(stream=True))
    async with asyncio.timeout(20):
        await reader.readuntil(b'"text":"x"')
    writer.close()
    await site.router.wait_for(num_aborted=2)
    assert len(set(site.router.aborted)) == 2


async def test_in_the_middle_of_an_answer_that_is_not_streamed(serve: Serve) -> None:
    gate = asyncio.Semaphore(6)
    site = await serve(lambda _: FOREVER, gate=gate)
    _, writer = await connect(site, asking(stream=False))
    await site.router.wait_for(num_requests=2)
    async with asyncio.timeout(20):
        while not gate.locked():
            await asyncio.sleep(0)
    writer.close()
    await site.router.wait_for(num_aborted=2)


async def test_within_its_own_request(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    site = await serve()
    with caplog.at_level(logging.DEBUG, "disagg.serve.api"):
        _, writer = await connect(site, b'{"prompt', length=1000)
        writer.close()
        async with asyncio.timeout(20):
            while "the client went away" not in caplog.text:
                await asyncio.sleep(0)
    assert site.router.requests == []
    assert "Traceback" not in caplog.text


async def test_it_counts_as_an_abort_and_not_as_a_failure(serve: Serve) -> None:
    site = await serve(lambda _: FOREVER, gate=asyncio.Semaphore(0))
    _, writer = await connect(site, asking(stream=True))
    await site.router.wait_for(num_requests=2)
    writer.close()
    await site.router.wait_for(num_aborted=2)
    await site.wait_for_metric("vllm:request_success_total", 2, finished_reason="abort")
    assert await site.metric("vllm:request_success_total", finished_reason="error") == 0
    assert await site.metric("disagg:error_responses_total") == 0


async def test_an_answer_that_was_complete_aborts_nothing(serve: Serve) -> None:
    site = await serve()
    _, writer = await connect(site, json.dumps({"prompt": "x", "max_tokens": 3}).encode())
    await site.router.wait_for(num_requests=1)
    await site.wait_for_metric("vllm:request_success_total", 1, finished_reason="length")
    writer.close()
    await site.http.get("/health")
    assert site.router.aborted == []


async def test_a_client_that_takes_nothing_counts_as_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disagg.serve.api.http.SEND_TIMEOUT_S", 0.01)

    async def send(_: object) -> None:
        await asyncio.Event().wait()

    with pytest.raises(ClientDisconnectedError):
        async with EventStream(send) as events:
            await events.write(b"data: 1\n\n")


async def test_waiting_for_tokens_is_not_waiting_for_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disagg.serve.api.http.SEND_TIMEOUT_S", 0.01)
    sent: list[object] = []

    async def send(message: object) -> None:
        sent.append(message)
        if len(sent) > 2:
            await asyncio.Event().wait()

    async with EventStream(send) as events:
        await events.write(b"data: 1\n\n")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.05):  # several times as long as a write may take
                await asyncio.Event().wait()
    with pytest.raises(ClientDisconnectedError):
        async with EventStream(send) as events:
            await events.write(b"data: 2\n\n")


async def test_a_body_that_does_not_come_is_not_waited_for(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disagg.serve.api.http.READ_TIMEOUT_S", 0.01)
    site = await serve()
    reader, writer = await connect(site, b'{"prompt', length=1000)
    async with asyncio.timeout(20):
        assert b"408" in await reader.readline()
    writer.close()
