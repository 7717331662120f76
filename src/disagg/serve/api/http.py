"""HTTP manners: bounded bodies, error responses, and noticing that a client has gone."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from disagg.base.errors import DisaggError, InvalidRequestError, OverloadedError, http_status
from disagg.serve.api.responses import DONE, ErrorBody, ErrorResponse, encode, event

Result = TypeVar("Result")

MAX_BODY_BYTES = 16 * 1024 * 1024
_TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ClientDisconnectedError(Exception):
    """The client went away before its answer; nobody is there to be told."""


async def read_body(request: Request) -> bytes:
    """Return a request's body. Raises InvalidRequestError above the limit, before it is in memory."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise InvalidRequestError(f"the body is longer than {MAX_BODY_BYTES} bytes")
        parts.append(part)
    return b"".join(parts)


async def until_disconnected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Run ``work``, but cancel it and raise ClientDisconnectedError when the client goes away before it ends."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_wait_for_disconnect(request.receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnectedError
        return working.result()
    finally:
        await _settle(working, leaving)


class EventStream(Response):
    """Server-sent events that were begun before the response: the first is ready when the status is sent."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], headers: dict[str, str], source: AsyncGenerator[Any]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
        del self.headers["content-length"]
        self._events = events
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end or the client goes away; close them and their source in both cases."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(_wait_for_disconnect(receive))
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            await _settle(sending, leaving)
            await self._events.aclose()
            await self._source.aclose()

    async def _send(self, send: Send) -> None:
        async for data in self._events:
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def error_response(error: DisaggError, headers: dict[str, str] | None = None) -> Response:
    """Return an error in OpenAI's shape with its status."""
    status = http_status(error)
    extra = {"Retry-After": str(max(1, round(error.retry_after_s)))} if isinstance(error, OverloadedError) else {}
    if status == 401:
        extra["WWW-Authenticate"] = "Bearer"
    return json_response(_error(error), status, {**(headers or {}), **extra})


def error_event(error: DisaggError) -> bytes:
    """Return an error for a stream whose status is sent already, and the stream's end."""
    return event(_error(error)) + DONE


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a response struct as JSON."""
    return Response(encode(value), status, headers, media_type="application/json")


def _error(error: DisaggError) -> ErrorResponse:
    status = http_status(error)
    param = error.param if isinstance(error, InvalidRequestError) else None
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return ErrorResponse(ErrorBody(str(error), kind, param, status))


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _settle(*tasks: "asyncio.Future[Any]") -> None:
    """Cancel what still runs and wait until it has ended, so that its clean-up is done."""
    for task in tasks:
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
