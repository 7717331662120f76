"""A small server with OpenAI's API in this process: what it does with each request is a function that a test gives."""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

DEADLINE_S = 30.0


@dataclass
class Received:
    """A request as it came."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def request_id(self) -> str:
        return self.headers.get("x-request-id", "")

    @property
    def index(self) -> int:
        """Its number in the load; -1 for one before the run."""
        number = self.request_id.rpartition("-")[2]
        return -1 if "warm-up" in self.request_id or not number else int(number)


class Reply:
    """What a behaviour answers with."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer

    def status(self, status: int, body: dict[str, Any] | None = None, headers: str = "") -> None:
        """A whole answer."""
        data = json.dumps(body or {}).encode()
        head = f"HTTP/1.1 {status} Whatever\r\ncontent-length: {len(data)}\r\n{headers}\r\n"
        self._writer.write(head.encode() + data)

    def open(self, headers: str = "transfer-encoding: chunked\r\n") -> None:
        """Begin a stream."""
        self._writer.write(f"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n{headers}\r\n".encode())

    def chunk(self, data: bytes) -> None:
        """A piece of a stream; an empty one ends it."""
        self._writer.write(b"%x\r\n%s\r\n" % (len(data), data))

    def event(self, event: dict[str, Any] | str) -> None:
        """One event."""
        text = event if isinstance(event, str) else json.dumps(event)
        self.chunk(f"data: {text}\n\n".encode())

    def token(self, number: int, text: str = " word", finish_reason: str | None = None) -> None:
        """An event of one token, the ``number``-th of the answer."""
        choice = {"index": 0, "text": text, "finish_reason": finish_reason}
        self.event({"choices": [choice], "usage": {"completion_tokens": number, "prompt_tokens": 1}})

    def close_stream(self, usage: dict[str, int] | None = None) -> None:
        """The events and the chunk that end a stream well."""
        if usage is not None:
            self.event({"choices": [], "usage": usage})
        self.event("[DONE]")
        self.chunk(b"")

    def raw(self, data: bytes) -> None:
        """Whatever it is."""
        self._writer.write(data)

    async def flush(self) -> None:
        """Return when everything written is on its way."""
        self._writer.transport.set_write_buffer_limits(high=0)
        await self._writer.drain()

    def drop(self) -> None:
        """Close the connection with a reset."""
        self._writer.transport.abort()

    def drop_gently(self) -> None:
        """Close the connection after what was written."""
        self._writer.close()


Behaviour = Callable[[Received, Reply], Awaitable[None]]


async def answer_at_once(received: Received, reply: Reply) -> None:
    """All tokens that are asked for, at once."""
    reply.open()
    count = received.body["max_tokens"]
    for number in range(1, count + 1):
        reply.token(number, finish_reason="length" if number == count else None)
    reply.close_stream()


@dataclass
class FakeServer:
    """Runs in a thread of its own. ``received`` are the requests for tokens, in order of arrival."""

    behaviour: Behaviour = answer_at_once
    pages: dict[str, Any] = field(default_factory=dict)
    """JSON of further paths, query included."""
    received: list[Received] = field(default_factory=list)
    num_streaming_connections: int = 0
    """Connections on which tokens were asked for."""
    url: str = ""
    _listening: asyncio.Server | None = None
    _tasks: set[Any] = field(default_factory=set)
    """Handlers: the loop itself only holds them weakly."""

    def stop_listening(self) -> None:
        """Take no new connections; to be called by a behaviour."""
        assert self._listening is not None
        self._listening.close()

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(asyncio.current_task())
        reply = Reply(writer)
        num_before = 0
        try:
            while True:
                received = await self._read(reader)
                if received.path in self.pages:
                    reply.status(200, self.pages[received.path])
                elif received.body:
                    self.received.append(received)
                    self.num_streaming_connections += num_before == 0
                    num_before += 1
                    await self.behaviour(received, reply)
                else:
                    reply.status(404)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client went away, or the server ends
        finally:
            writer.transport.abort()

    async def _read(self, reader: asyncio.StreamReader) -> Received:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = int(headers.get("content-length", 0))
        body = json.loads(await reader.readexactly(length)) if length else {}
        return Received(first.split(" ")[1], headers, body)


@contextmanager
def fake_server(behaviour: Behaviour = answer_at_once, pages: dict[str, Any] | None = None) -> Iterator[FakeServer]:
    """Run a server for the length of a block."""
    server = FakeServer(behaviour, {"/v1/models": {"data": [{"id": "fake-model"}]}, **(pages or {})})
    ready, stop, loops = threading.Event(), asyncio.Event(), []

    async def serve() -> None:
        listening = await asyncio.start_server(server._handle, "127.0.0.1", 0, limit=1 << 24)
        server._listening = listening
        server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        loops.append(asyncio.get_running_loop())
        ready.set()
        await stop.wait()
        listening.close()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert ready.wait(DEADLINE_S)
    try:
        yield server
    finally:
        loops[0].call_soon_threadsafe(stop.set)
        thread.join(DEADLINE_S)


class WordTokenizer:
    """One token for each word, and one that stands before every prompt, as with a begin-of-sequence token."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [0] * add_special_tokens + [len(word) for word in text.split()]
