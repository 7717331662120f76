"""HTTP/1.1 for a load client: one request at a time on a connection, pieces of the answer stamped as they come.

Why not a general client: on the server's machine, the server lacks what the client takes of the cores. Per streamed
event httpx takes 97 us of CPU, aiohttp 46 (27 on uvloop), this 10 on uvloop. What an answer says is read after its end.
"""

import asyncio
import ssl
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Final, cast
from urllib.parse import urlsplit

import httptools

from disagg.base.errors import ConfigurationError, UnavailableError

_MAX_IDLE_S: Final = 2.0
"""Servers close idle connections after 5 s and more; one that is closed just now costs an attempt."""
CONNECT_TIMEOUT_S: Final = 10.0


class LostConnectionError(OSError):
    """The connection ended before the answer did. ``answer`` holds what came."""


class ConnectTimeoutError(OSError):
    """No connection came about in time."""


@dataclass(slots=True)
class HttpAnswer:
    """An HTTP answer as it comes. ``pieces`` are its body's, each with its moment (of ``time.perf_counter``)."""

    status: int = 0
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    ended_s: float | None = None
    """When the last byte came."""

    @property
    def body(self) -> bytes:
        """All that came."""
        return b"".join(piece for _, piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is."""

    host: str
    port: int
    path: str
    """What comes before ``/v1``; mostly empty."""
    is_secure: bool

    @classmethod
    def of(cls, base_url: str) -> "Address":
        """Read a URL; raise ConfigurationError when it is none of HTTP."""
        try:
            parts = urlsplit(base_url)
            port = parts.port
        except ValueError as error:
            raise ConfigurationError(f"{base_url!r} is not a URL: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigurationError(f"{base_url!r} is not a URL such as http://127.0.0.1:8000")
        is_secure = parts.scheme == "https"
        return cls(parts.hostname, port or (443 if is_secure else 80), parts.path.rstrip("/"), is_secure)

    @property
    def host_header(self) -> str:
        """Host and port as a request names them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


class HttpConnection(asyncio.Protocol):
    """One connection. ``exchange`` may be called again once it has returned and ``is_reusable``."""

    def __init__(self) -> None:
        self.is_reusable = True
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._answer = HttpAnswer()
        self._now_s = 0.0
        self._has_length = False
        self._ended: asyncio.Future[None] | None = None

    async def exchange(self, request: bytes, answer: HttpAnswer) -> None:
        """Send a whole request and fill ``answer``. Raises LostConnectionError; cancelling closes the connection."""
        assert self._transport is not None, "a connection that is not made"
        if self._transport.is_closing():
            raise LostConnectionError("the server had closed the connection")
        self._answer, self._has_length = answer, False
        self._parser = httptools.HttpResponseParser(self)
        self._ended = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            await self._ended
        except BaseException:
            self.close()
            raise
        finally:
            self._parser = self._ended = None

    def close(self) -> None:
        """End the connection at once."""
        self.is_reusable = False
        if self._transport is not None:
            self._transport.abort()

    # asyncio calls these -----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Note the transport."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are not of asyncio's classes

    def data_received(self, data: bytes) -> None:
        """Stamp what came, then look where the answer ends."""
        self._now_s = time.perf_counter()
        if self._parser is None:
            self.close()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(LostConnectionError(f"the answer is not HTTP: {error}"))
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """An answer without a length ends with its connection."""
        self.is_reusable = False
        if self._answer.status and not self._has_length and exc is None:
            self._answer.ended_s = time.perf_counter()
            if self._ended is not None and not self._ended.done():
                self._ended.set_result(None)
        self._fail(LostConnectionError(str(exc) if exc else "the server closed the connection"))

    # httptools calls these ---------------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        """Note whether the answer says where it ends."""
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._has_length = True

    def on_headers_complete(self) -> None:
        """Note the status."""
        assert self._parser is not None, "httptools calls within feed_data"
        self._answer.status = self._parser.get_status_code()

    def on_body(self, piece: bytes) -> None:
        """Keep a piece of the body."""
        self._answer.pieces.append((self._now_s, piece))

    def on_message_complete(self) -> None:
        """Hand the answer over."""
        assert self._parser is not None, "httptools calls within feed_data"
        self._answer.ended_s = self._now_s
        self.is_reusable = self._parser.should_keep_alive()
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)

    def _fail(self, error: LostConnectionError) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_exception(error)


class ConnectionPool:
    """Connections to one server: an idle one, or a new one, for each request; never a queue."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._ip = address.host
        self._tls = ssl.create_default_context() if address.is_secure else None
        self._idle: deque[tuple[float, HttpConnection]] = deque()

    async def open(self) -> None:
        """Connect once, and keep to that address of the host's. Raises UnavailableError when none answers."""
        address = self._address
        loop = asyncio.get_running_loop()
        error: OSError | None = None
        try:
            found = await loop.getaddrinfo(address.host, address.port, type=1)
        except OSError as failure:
            found, error = [], failure
        for ip in dict.fromkeys(entry[4][0] for entry in found):
            self._ip = str(ip)
            try:
                self._idle.append((time.perf_counter(), await self._connect()))
            except OSError as failure:
                error = failure
            else:
                return
        raise UnavailableError(
            f"no answer from {address.host}:{address.port} ({error}); start a server with: disagg serve"
        )

    async def exchange(self, request: bytes, answer: HttpAnswer) -> None:
        """Send a request and fill ``answer``; raise OSError when there is no connection or it is lost."""
        connection = self._take()
        if connection is not None:
            try:
                await self._use(connection, request, answer)
            except LostConnectionError:
                if answer.status:
                    raise
            else:
                return
        # A kept connection that is lost before the answer began was closed for being idle: that is no failure.
        await self._use(await self._connect(), request, answer)

    def close(self) -> None:
        """End the idle connections."""
        while self._idle:
            self._idle.pop()[1].close()

    def _take(self) -> HttpConnection | None:
        """Return the connection used last; close those that have been idle for too long."""
        oldest_s = time.perf_counter() - _MAX_IDLE_S
        while self._idle and self._idle[0][0] < oldest_s:
            self._idle.popleft()[1].close()
        while self._idle:
            connection = self._idle.pop()[1]
            if connection.is_reusable:
                return connection
        return None

    async def _use(self, connection: HttpConnection, request: bytes, answer: HttpAnswer) -> None:
        await connection.exchange(request, answer)
        if connection.is_reusable:
            self._idle.append((time.perf_counter(), connection))
        else:
            connection.close()

    async def _connect(self) -> HttpConnection:
        loop = asyncio.get_running_loop()
        hostname = self._address.host if self._tls is not None else None
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, connection = await loop.create_connection(
                    HttpConnection, self._ip, self._address.port, ssl=self._tls, server_hostname=hostname
                )
        except TimeoutError as error:  # ours, or the kernel's
            raise ConnectTimeoutError(f"no connection to {self._ip} after {CONNECT_TIMEOUT_S:g} s") from error
        return connection
