"""HTTP by hand where it matters: bounded bodies, and events that cost one write each time something has arrived."""

import asyncio
import math
from types import TracebackType
from typing import Final, Protocol, Self

from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from disagg.serve.api.disconnect import ClientDisconnectedError

MAX_BODY_BYTES: Final = 16 * 1024 * 1024
READ_TIMEOUT_S: Final = 60.0
"""How long a request's body may take to arrive."""
SEND_TIMEOUT_S: Final = 60.0
"""How long a client may leave its end of the connection full before it counts as gone."""

_JSON_HEADER: Final = (b"content-type", b"application/json")
_EVENT_HEADERS: Final = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


DIRECT_WRITER: Final = "disagg.direct_writer"
"""Name of the ASGI extension by which our server offers a ``DirectWriter``."""


class DirectWriter(Protocol):
    """A response's way to the client beside ASGI's ``send``, for parts that need not wait: it costs a fraction."""

    def is_ready(self) -> bool:
        """Return whether the response has begun, in chunks, and the client has taken what was sent before."""

    def write(self, body: bytes) -> None:
        """Send a part of the body, which is not empty, at once. Only for a writer that ``is_ready``."""


def direct_writer(scope: Scope) -> DirectWriter | None:
    """Return that of a request's response, None where the server offers none."""
    writer: DirectWriter | None = scope.get("extensions", {}).get(DIRECT_WRITER)
    return writer


async def read_body(receive: Receive) -> bytes:
    """Return a request's body.

    Raises HTTPException once it is over ``MAX_BODY_BYTES`` (413) or ``READ_TIMEOUT_S`` (408), ClientDisconnectedError
    when the client goes away before its end.
    """
    try:
        async with asyncio.timeout(READ_TIMEOUT_S):
            return await _read_parts(receive)
    except TimeoutError:
        raise HTTPException(408, f"no whole body came in {READ_TIMEOUT_S:g} s", {"Connection": "close"}) from None


async def _read_parts(receive: Receive) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnectedError
        part = message.get("body", b"")
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise HTTPException(413, f"the body is longer than {MAX_BODY_BYTES} bytes", {"Connection": "close"})
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


RawHeaders = tuple[tuple[bytes, bytes], ...]
"""Names in lower case, and values."""


async def send_json(send: Send, body: bytes, further: RawHeaders = ()) -> None:
    """Send a whole JSON response with status 200, with ``further`` headers."""
    headers = [_JSON_HEADER, (b"content-length", str(len(body)).encode()), *further]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class EventStream:
    """A response of server-sent events, to be written within ``async with``. Its status goes out with the first event,
    so that errors before it can have theirs.

    Leaving the block raises ClientDisconnectedError when a write was not taken in ``SEND_TIMEOUT_S``. One timer looks
    after all writes, most of which are done at once.
    """

    def __init__(self, send: Send, further: RawHeaders = ()) -> None:
        self._send = send
        self._headers = (*_EVENT_HEADERS, *further)
        self.started = False
        self._writing_since_s = math.inf

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._timeout = asyncio.timeout(None)
        await self._timeout.__aenter__()
        self._check()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._next_check.cancel()
        try:
            await self._timeout.__aexit__(kind, error, traceback)
        except TimeoutError:
            raise ClientDisconnectedError from None

    async def write(self, events: bytes | bytearray) -> None:
        """Send encoded events in one write."""
        if not self.started:
            self.started = True
            await self._deliver({"type": "http.response.start", "status": 200, "headers": list(self._headers)})
        await self._deliver({"type": "http.response.body", "body": bytes(events), "more_body": True})

    async def end(self) -> None:
        """End the response."""
        await self._deliver({"type": "http.response.body", "body": b"", "more_body": False})

    async def _deliver(self, message: dict[str, object]) -> None:
        self._writing_since_s = self._loop.time()
        await self._send(message)
        self._writing_since_s = math.inf

    def _check(self) -> None:
        """Let the block end if a write is overdue; otherwise look again when this one or a later one first could be."""
        now, overdue_s = self._loop.time(), self._writing_since_s + SEND_TIMEOUT_S
        if overdue_s <= now:
            self._timeout.reschedule(now)
        else:
            self._next_check = self._loop.call_at(min(overdue_s, now + SEND_TIMEOUT_S), self._check)
