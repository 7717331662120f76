"""A campaign against the HTTP edge of a real server: thousands of bad connections beside a few good ones."""

import asyncio
import json
import os
import random
import signal
import socket
import struct
import time
from contextlib import suppress

import httpx
import psutil
import pytest
from server_process import ServerProcess, serving

NUM_BAD = 2000
NUM_AT_ONCE = 500
NUM_GOOD = 60
MAX_FILES = 600
DEADLINE_S = 300.0
HEALTH_S = 5.0
"""Generous: the machine is shared with a model at work, and what does not fit a short backlog asks again after 1 s."""

BODY = json.dumps({"prompt": "x", "max_tokens": 4, "ignore_eos": True, "stream": True}).encode()
REQUEST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY)
PIECES = {
    "silent": b"",
    "half a head": REQUEST[:30],
    "half a body": REQUEST[:-10],
    "garbage": b"\x16\x03\x01\x02\x00\x01\x00",
    "long headers": b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * 20_000,
    "broken chunks": b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "an upgrade": b"GET /health HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    "a whole request": REQUEST,
    "two requests": REQUEST * 2,
    "old": REQUEST.replace(b"HTTP/1.1", b"HTTP/1.0"),
}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


async def misbehave(host: str, port: int, kind: str, draw: random.Random) -> None:
    """Connect, send a piece, and go in one of several ways."""
    with suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
        async with asyncio.timeout(20):
            reader, writer = await asyncio.open_connection(host, port)
        try:
            writer.write(PIECES[kind])
            how = draw.randrange(4)
            if how == 0:
                writer.write_eof()
            async with asyncio.timeout(draw.uniform(0.1, 3.0)):
                await reader.read()
        finally:
            if how == 1:
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.close()


async def ask_nicely(url: str, number: int) -> tuple[int, int]:
    """Return the status of a completion on a connection of its own, and the number of its tokens."""
    async with httpx.AsyncClient(timeout=DEADLINE_S) as client:
        body = {"prompt": f"Count: {number}", "max_tokens": 8, "ignore_eos": True}
        answer = await client.post(f"{url}/v1/completions", json=body)
        return answer.status_code, answer.json()["usage"]["completion_tokens"] if answer.is_success else 0


async def slowest_health(url: str, until: asyncio.Event) -> float:
    slowest = 0.0
    async with httpx.AsyncClient(timeout=DEADLINE_S) as client:
        while not until.is_set():
            start = time.monotonic()
            assert (await client.get(f"{url}/health", headers={"Connection": "close"})).status_code == 200
            slowest = max(slowest, time.monotonic() - start)
            await asyncio.sleep(0.05)
    return slowest


async def campaign(server: ServerProcess, num_bad: int) -> tuple[list[tuple[int, int]], float]:
    host, port = server.url.removeprefix("http://").split(":")
    draw, kinds = random.Random(0), list(PIECES)
    turns, over = asyncio.Semaphore(NUM_AT_ONCE), asyncio.Event()

    async def one(number: int) -> None:
        async with turns:
            await misbehave(host, int(port), kinds[number % len(kinds)], draw)

    watching = asyncio.create_task(slowest_health(server.url, over))
    bad = [asyncio.create_task(one(number)) for number in range(num_bad)]
    good = [await ask_nicely(server.url, number) for number in range(NUM_GOOD)]
    await asyncio.gather(*bad)
    over.set()
    return good, await watching


def test_bad_connections_hurt_no_good_request() -> None:
    with serving("--max-model-len", "512", "--kv-memory", "128MiB", max_files=MAX_FILES) as server:
        process = psutil.Process(server.process.pid)
        asyncio.run(campaign(server, 20))  # whatever is opened once is open now
        wait_until_idle(server)
        before = process.num_fds()
        good, health_s = asyncio.run(campaign(server, NUM_BAD))
        assert good == [(200, 8)] * NUM_GOOD
        assert health_s < HEALTH_S
        wait_until_idle(server)
        end = time.monotonic() + 60
        while process.num_fds() > before + 5:
            assert time.monotonic() < end, (before, process.num_fds())
            time.sleep(0.1)
        # An instance is started again beside as many silent connections as the server lets in.
        with suppress(OSError):
            host, port = server.url.removeprefix("http://").split(":")
            silent = [socket.create_connection((host, int(port))) for _ in range(MAX_FILES)]
        os.kill(server.instances()[0].pid, signal.SIGKILL)
        end = time.monotonic() + 60
        while " died: " not in server.text:
            assert time.monotonic() < end, "the death was not noticed"
            time.sleep(0.1)
        assert asyncio.run(ask_nicely(server.url, 0)) == (200, 8)
        for connection in silent:
            connection.close()
        assert server.text.count(" died: ") == 1, server.text
    assert "Traceback" not in server.text, server.text
    assert "Too many open files" not in server.text


def wait_until_idle(server: ServerProcess) -> None:
    end = time.monotonic() + 120
    while server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting"):
        assert time.monotonic() < end, "requests of clients that have gone are still running"
        time.sleep(0.1)
