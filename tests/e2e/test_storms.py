"""Storms of clients that connect, ask and are gone: nothing of them stays, and the answers of others are the same."""

import asyncio
import json
import random
import socket
import struct
import sys
from contextlib import suppress

import psutil
import pytest
from fault_campaign import SETTINGS, audit, num_held_blocks
from server_process import ServerProcess, completion, serving
from test_lifecycle import wait_for

NUM_AT_ONCE = 100
NUM_SHORT = 40
PROMPT = "There was a house by the sea, and in it lived"
FIELDS = {"max_tokens": 24, "min_tokens": 24, "temperature": 0.0, "return_token_ids": True}


async def ask_and_cut(host: str, port: int, draw: random.Random) -> None:
    """Ask for a long stream, and be gone: at once, after the first bytes, or some bytes later; politely or not."""
    length, words = draw.randint(1, 8), "the tide came in and went out again, "
    body = json.dumps({"prompt": f"{draw.random()} {words * length}", "max_tokens": 200, "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    with suppress(OSError, TimeoutError):
        async with asyncio.timeout(60):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(head + body)
                await writer.drain()
                for _ in range(draw.randrange(4)):
                    await reader.read(100)
            finally:
                if draw.random() < 0.5:
                    linger = struct.pack("ii", 1, 0)
                    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                writer.close()


async def storm(server: ServerProcess, count: int, seed: int) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    turns, draw = asyncio.Semaphore(NUM_AT_ONCE), random.Random(seed)

    async def one() -> None:
        async with turns:
            await ask_and_cut(host, int(port), draw)

    await asyncio.gather(*(one() for _ in range(count)))


def resources(server: ServerProcess) -> dict[int, tuple[int, int]]:
    """Open files and resident bytes of the server and each of its processes."""
    own = psutil.Process(server.process.pid)
    return {
        process.pid: (process.num_fds(), process.memory_info().rss)
        for process in (own, *own.children(recursive=True))
        if process.is_running()
    }


def wait_until_calm(server: ServerProcess) -> None:
    waiting = ("vllm:num_requests_running", "vllm:num_requests_waiting")
    wait_for(lambda: not any(map(server.metric, waiting)), "the requests of clients that are gone to end")
    wait_for(lambda: num_held_blocks(server) == 0, "all KV blocks to come back")


def run_storm(count: int) -> str:
    """Return what it came to, as a row of a table."""
    with serving("--prefill", "1", "--decode", "1", *SETTINGS) as server:
        expected = completion(server, PROMPT, **FIELDS).choices[0].token_ids
        asyncio.run(storm(server, NUM_SHORT, seed=1))  # what is opened, cached and allocated once is there from now on
        wait_until_calm(server)
        before = resources(server)
        asyncio.run(storm(server, count, seed=2))
        wait_until_calm(server)
        assert completion(server, PROMPT, **FIELDS).choices[0].token_ids == expected
        wait_for(
            lambda: all(after[0] <= before[pid][0] + 5 for pid, after in resources(server).items()), "closed files"
        )
        after = resources(server)
        assert after.keys() == before.keys(), server.text
        for pid, (_, num_bytes) in after.items():
            assert num_bytes < 1.2 * before[pid][1] + (16 << 20), (pid, before[pid], after[pid])
        found = audit(server)
        assert found["is_exact"], found
        assert server.text.count("Traceback") == 0, server.text
        files, sizes = ([sum(one[index] for one in each.values()) for each in (before, after)] for index in (0, 1))
        return f"| {count} | {files[0]} | {files[1]} | {sizes[0] >> 20} MiB | {sizes[1] >> 20} MiB |"


def test_a_short_storm_leaves_nothing_behind() -> None:
    run_storm(NUM_SHORT)


@pytest.mark.slow
def test_a_storm_of_ten_thousand_leaves_nothing_behind(capsys: pytest.CaptureFixture[str]) -> None:
    row = run_storm(10_000)
    with capsys.disabled():
        sys.stdout.write(f"\n{row}\n")
