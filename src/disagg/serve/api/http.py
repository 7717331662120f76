"""HTTP by hand where it matters: bounded bodies, and events that cost one write each time something has arrived."""

import asyncio
from typing import Final

from starlette.exceptions import HTTPException
from starlette.types import Receive, Send

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


async def send_json(send: Send, body: bytes) -> None:
    """Send a whole JSON response with status 200."""
    headers = [_JSON_HEADER, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class EventStream:
    """A response of server-sent events. Its status goes out with the first event, so that errors before it can have
    theirs.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False

    async def write(self, events: bytes | bytearray) -> None:
        """Send encoded events in one write. Raises ClientDisconnectedError when the client does not take them."""
        if not self.started:
            self.started = True
            await self._deliver({"type": "http.response.start", "status": 200, "headers": list(_EVENT_HEADERS)})
        await self._deliver({"type": "http.response.body", "body": bytes(events), "more_body": True})

    async def end(self) -> None:
        """End the response."""
        await self._deliver({"type": "http.response.body", "body": b"", "more_body": False})

    async def _deliver(self, message: dict[str, object]) -> None:
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await self._send(message)
        except TimeoutError:
            raise ClientDisconnectedError from None
