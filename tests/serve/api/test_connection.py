"""The HTTP edge, with raw sockets: what odd, old, slow and hostile clients get."""

import asyncio
import json

import pytest
from api_site import Serve, ids_of
from raw_client import GET_HEALTH, ask, completion, connected

from disagg.base.config import ServeSettings
from disagg.serve.launch import http_connection as connection

FOREVER = ids_of("x") * 250
HURRIED = ServeSettings(header_timeout_s=0.05, keep_alive_s=0.05)
H2C = (
    "Connection: Upgrade, HTTP2-Settings",
    "Upgrade: h2c",
    "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA",
)


# Upgrades ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [H2C, ("Connection: keep-alive, Upgrade", "Upgrade: websocket")])
async def test_a_request_that_asks_for_an_upgrade_is_served_as_it_is(serve: Serve, headers: tuple[str, ...]) -> None:
    site = await serve()
    async with connected(site) as client:
        for _ in range(2):
            await client.send(completion("HTTP/1.1", *headers))
            status, body = await client.read_response()
            assert (status, json.loads(body)["choices"][0]["text"]) == (200, "The")


async def test_a_chunked_body_behind_an_upgrade_in_pieces(serve: Serve) -> None:
    site = await serve()
    body = b'{"prompt": "x", "max_tokens": 3}'
    head = b"\r\n".join([b"POST /v1/completions HTTP/1.1", *(line.encode() for line in H2C)])
    request = head + b"\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    async with connected(site) as client:
        for index in range(0, len(request), 7):
            await client.send(request[index : index + 7])
        assert (await client.read_response())[0] == 200
        await client.send(request + GET_HEALTH + request)
        assert [(await client.read_response())[0] for _ in range(3)] == [200] * 3


async def test_an_upgrade_that_wants_to_close_is_closed(serve: Serve) -> None:
    site = await serve()
    answer = await ask(site, completion("HTTP/1.1", "Connection: close, Upgrade", "Upgrade: h2c"))
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")


async def test_connect_is_refused(serve: Serve) -> None:
    answer = await ask(await serve(), b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org:443\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\n")


# Half-closed connections ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_sends_no_more_is_answered(serve: Serve, stream: bool) -> None:
    gate = asyncio.Semaphore(0)
    site = await serve(lambda _: FOREVER, gate=gate)
    async with connected(site) as client:
        await client.send(completion(stream=stream))
        client.shut_sending_side()
        await site.router.wait_for(num_requests=1)
        first = await client.read_until(b"H")  # it is asked whether it still reads
        for _ in range(3):
            gate.release()
        answer = first + await client.read_to_end()
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.count(b"HTTP/1.1") == 1
    assert (b"[DONE]" in answer) == stream
    assert b"xxx" in answer or stream
    assert site.router.aborted == []


async def test_a_stream_goes_on_when_its_client_sends_no_more(serve: Serve) -> None:
    gate = asyncio.Semaphore(1)
    site = await serve(lambda _: FOREVER, gate=gate)
    async with connected(site) as client:
        await client.send(completion(stream=True))
        answer = await client.read_until(b"data: ")
        client.shut_sending_side()
        answer += await client.read_until(b"\r\n00")  # the zeros are part of the next chunk's length
        gate.release()
        gate.release()
        answer += await client.read_to_end()
    assert _unchunked(answer).endswith(b"data: [DONE]\n\n")
    assert site.router.aborted == []


def _unchunked(answer: bytes) -> bytes:
    _, _, rest = answer.partition(b"\r\n\r\n")
    body = b""
    while True:
        length, _, rest = rest.partition(b"\r\n")
        size = int(length, 16)
        if size == 0:
            assert rest == b"\r\n"
            return body
        body, rest = body + rest[:size], rest[size + 2 :]


async def test_an_error_is_told_to_a_client_that_sends_no_more(serve: Serve) -> None:
    site = await serve()
    async with connected(site) as client:
        await client.send(completion(max_tokens=-1))
        client.shut_sending_side()
        assert (await client.read_to_end()).startswith(b"HTTP/1.1 400 Bad Request\r\n")


async def test_all_pipelined_requests_of_a_client_that_sends_no_more_are_answered(serve: Serve) -> None:
    site = await serve()
    async with connected(site) as client:
        await client.send(completion() + GET_HEALTH + completion() + b"GET /he")
        client.shut_sending_side()
        answer = await client.read_to_end()
    assert answer.count(b"HTTP/1.1 200 OK\r\n") == 3


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_client_that_sends_no_more_and_then_goes_is_noticed(serve: Serve, how: str) -> None:
    site = await serve(lambda _: FOREVER, gate=asyncio.Semaphore(0))
    async with connected(site) as client:
        await client.send(completion())
        client.shut_sending_side()
        await site.router.wait_for(num_requests=1)
        await client.read_until(b"H")
        getattr(client, how)()
        await site.router.wait_for(num_aborted=1)


async def test_a_pipelining_client_that_goes_takes_the_request_under_way_along(serve: Serve) -> None:
    site = await serve(lambda _: FOREVER, gate=asyncio.Semaphore(0))
    async with connected(site) as client:
        await client.send(completion() + completion())
        await site.router.wait_for(num_requests=1)
        client.reset()
        await site.router.wait_for(num_aborted=1)


# HTTP/1.0 ---------------------------------------------------------------------------------------------------------


async def test_a_stream_to_an_old_client_has_no_chunks_and_ends_with_the_connection(serve: Serve) -> None:
    site = await serve(lambda _: FOREVER)
    answer = await ask(site, completion("HTTP/1.0", "Connection: keep-alive", "Expect: 100-continue", stream=True))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert b"connection: close" in head.lower()
    assert body.startswith(b"data: {")
    assert body.endswith(b"}\n\ndata: [DONE]\n\n")


async def test_other_answers_to_an_old_client_keep_their_length(serve: Serve) -> None:
    site = await serve()
    head, _, body = (await ask(site, completion("HTTP/1.0"))).partition(b"\r\n\r\n")
    assert f"content-length: {len(body)}".encode() in head.lower()


# Bounds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "start",
    [
        b"GET /health HTTP/1.1\r\nX: " + b"a" * 100_000,
        b"GET /health HTTP/1.1\r\n" + b"X: a\r\n" * 20_000,
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n",
        b"GET /health HTTP/1.1\r\n" + b"a" * 100_000,
        b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + b"X: a\r\n" * 20_000,
    ],
    ids=["value", "lines", "url", "name", "trailers"],
)
async def test_headers_are_bounded(serve: Serve, start: bytes) -> None:
    site = await serve()
    more = b"a" * 65536
    async with connected(site) as client:
        await client.send(start)
        reading = asyncio.create_task(client.read_to_end())
        sent = 0
        while not reading.done() and sent < 300 * 2**20:  # the server may cut the connection while we send
            try:
                await client.send(more)
            except ConnectionError:
                break
            sent += len(more)
        (answer,) = await asyncio.gather(reading, return_exceptions=True)
    if isinstance(answer, bytes):
        assert answer.startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\n")
    assert sent < 300 * 2**20
    assert (await site.http.get("/health")).status_code == 200


async def test_the_refusal_of_long_headers_is_in_openais_shape(serve: Serve) -> None:
    answer = await ask(await serve(), b"GET /health HTTP/1.1\r\nX: " + b"a" * 70_000 + b"\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 ")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


async def test_small_chunks_are_no_headers(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MAX_HEAD_BYTES", 200)
    site = await serve()
    body = json.dumps({"prompt": "x" * 200, "max_tokens": 3}).encode()
    async with connected(site) as client:
        await client.send(b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        for byte in body:
            await client.send(b"1\r\n%c\r\n" % byte)
        await client.send(b"0\r\n\r\n")
        assert (await client.read_response())[0] == 200


@pytest.mark.parametrize("data", [b"", b"\r\n\r\n", b"GET /health HT"])
async def test_clients_that_do_not_ask_are_not_waited_for(serve: Serve, data: bytes) -> None:
    site = await serve(settings=HURRIED)
    async with connected(site) as client:
        await client.send(data)
        answer = await client.read_to_end()
    assert answer.startswith(b"HTTP/1.1 408 Request Timeout\r\n") == data.startswith(b"GET")


async def test_a_trickle_does_not_stretch_the_deadline(serve: Serve) -> None:
    site = await serve(settings=HURRIED)
    async with connected(site) as client:
        await client.send(b"GET /health HTTP/1.1\r\n")
        reading = asyncio.create_task(client.read_to_end())
        while not reading.done():
            await client.send(b"a: b\r\n")
            await asyncio.sleep(0.01)
        assert reading.result().startswith(b"HTTP/1.1 408 ")


async def test_an_idle_connection_is_kept_as_long_as_is_said(serve: Serve) -> None:
    assert ServeSettings().keep_alive_s >= 60
    site = await serve(settings=ServeSettings(keep_alive_s=0.05))
    async with connected(site) as client:
        await client.send(GET_HEALTH)
        assert (await client.read_response())[0] == 200
        assert await client.read_to_end() == b""


async def test_an_answer_that_takes_long_is_no_idle_connection(serve: Serve) -> None:
    gate = asyncio.Semaphore(0)
    site = await serve(lambda _: FOREVER, gate=gate, settings=HURRIED)
    async with connected(site) as client:
        await client.send(completion())
        await site.router.wait_for(num_requests=1)
        async with connected(site) as other:
            await other.read_to_end()  # as long as any deadline
        for _ in range(3):
            gate.release()
        assert (await client.read_response())[0] == 200


async def test_a_body_that_comes_after_its_answer_has_a_deadline(serve: Serve) -> None:
    site = await serve(settings=HURRIED)
    async with connected(site) as client:
        await client.send(b"POST /nowhere HTTP/1.1\r\nContent-Length: 10\r\n\r\n")
        assert (await client.read_response())[0] == 404
        await client.send(b"half")
        assert await client.read_to_end() == b""


@pytest.mark.parametrize("garbage", [b"\x16\x03\x01\x02\x00", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"hello\r\n\r\n"])
async def test_garbage_is_refused_in_openais_shape(serve: Serve, garbage: bytes) -> None:
    head, _, body = (await ask(await serve(), garbage)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert "not valid HTTP" in json.loads(body)["error"]["message"]


async def test_garbage_behind_a_request_does_not_garble_its_answer(serve: Serve) -> None:
    gate = asyncio.Semaphore(1)
    site = await serve(lambda _: FOREVER, gate=gate)
    async with connected(site) as client:
        await client.send(completion(stream=True))
        answer = await client.read_until(b"data: ")
        await client.send(b"\x00\x00\x00")
        gate.release()
        gate.release()
        answer += await client.read_to_end()
    assert answer.count(b"HTTP/1.1") == 1
    assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


async def test_a_broken_body_is_refused_at_once(serve: Serve) -> None:
    site = await serve()
    request = b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"
    assert (await ask(site, request)).startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert site.router.requests == []


async def test_silent_connections_keep_nobody_out(serve: Serve) -> None:
    site = await serve(max_connections=5)
    silent = [connected(site) for _ in range(20)]
    clients = [await one.__aenter__() for one in silent]
    for _ in range(3):
        answer = await ask(site, completion("HTTP/1.1", "Connection: close"))
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert await clients[0].read_to_end() == b"", "the oldest went first"
    for one in silent:
        await one.__aexit__(None, None, None)


async def test_more_connections_than_can_be_held_get_a_503(serve: Serve) -> None:
    site = await serve(lambda _: FOREVER, gate=asyncio.Semaphore(0), max_connections=2)
    async with connected(site) as one, connected(site) as two:
        for number, client in enumerate((one, two), start=1):
            await client.send(completion())
            await site.router.wait_for(num_requests=number)
        async with connected(site) as three:
            assert (await three.read_to_end()).startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
    await site.router.wait_for(num_aborted=2)


# Keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
async def test_a_key_beyond_ascii_is_taken_as_clients_write_it(serve: Serve, encoding: str) -> None:
    site = await serve()
    site = await serve(api_key="schlüssel")
    head = "GET /v1/models HTTP/1.1\r\nConnection: close\r\nAuthorization: Bearer "
    for key, status in (("schlüssel", b"200"), ("schlussel", b"401"), ("", b"401")):
        answer = await ask(site, head.encode() + key.encode(encoding) + b"\r\n\r\n")
        assert answer.split()[1] == status


async def test_a_key_that_latin_1_lacks_works(serve: Serve) -> None:
    site = await serve(api_key="ключ")
    answer = await ask(
        site, "GET /v1/models HTTP/1.1\r\nConnection: close\r\nAuthorization: Bearer ключ\r\n\r\n".encode()
    )
    assert answer.split()[1] == b"200"
