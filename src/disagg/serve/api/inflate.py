"""Bodies that come compressed, opened as they are read: what is too long when opened is refused where that is found."""

import asyncio
import zlib
from typing import Final

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from disagg.serve.api.failures import plain_error_response

_GZIP: Final = frozenset({"gzip", "x-gzip"})
_GZIP_WINDOW: Final = 31
"""zlib's number for gzip's header and its largest window."""
_PART_BYTES: Final = 256 * 1024
"""Opened at once, in about a millisecond: a small body may open to a large one."""


class Inflate:
    """ASGI middleware: ``Content-Encoding: gzip`` is opened, any other encoding gets 415."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its body as it was before it was compressed."""
        encoding = Headers(scope=scope).get("content-encoding", "").strip().lower() if scope["type"] == "http" else ""
        if encoding in ("", "identity"):
            await self._app(scope, receive, send)
        elif encoding in _GZIP:
            await self._app(scope, _Opened(receive), send)
        else:
            words = f"'Content-Encoding: {encoding[:80]}' is not supported: send gzip, or the body as it is"
            await plain_error_response(415, words, {"Accept-Encoding": "gzip"})(scope, receive, send)


class _Opened:
    """A body's messages, opened. Raises HTTPException with 400 for what is no gzip."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._inflater = zlib.decompressobj(_GZIP_WINDOW)
        self._waiting = b""
        self._holds_more = False
        """Whether the last part was full, so that there may be more without further input."""
        self._is_all_here = False

    async def __call__(self) -> Message:
        while not self._is_done():
            if not self._waiting and not self._holds_more:
                message = await self._receive()
                if message["type"] != "http.request":
                    return message
                self._waiting = message.get("body", b"")
                self._is_all_here = not message.get("more_body", False)
            body = self._open()
            if body or self._is_done():
                await asyncio.sleep(0)
                return {"type": "http.request", "body": body, "more_body": not self._is_done()}
        return await self._receive()

    def _is_done(self) -> bool:
        return self._is_all_here and not self._waiting and not self._holds_more

    def _open(self) -> bytes:
        try:
            body = self._inflater.decompress(self._waiting, _PART_BYTES)
        except zlib.error as error:
            raise HTTPException(400, f"the body is no gzip: {error}", {"Connection": "close"}) from None
        self._waiting = self._inflater.unconsumed_tail
        self._holds_more = len(body) == _PART_BYTES and not self._inflater.eof
        if self._inflater.unused_data:
            raise HTTPException(400, "the body goes on after the end of its gzip", {"Connection": "close"})
        if self._is_done() and not self._inflater.eof:
            raise HTTPException(400, "the body ends before its gzip does", {"Connection": "close"})
        return body
