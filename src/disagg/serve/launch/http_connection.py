"""One client's connection: uvicorn's HTTP/1.1 protocol, with what it leaves open to a careless or hostile client.

A subclass, since uvicorn has no setting for any of this: a bound for what surrounds bodies (431), deadlines for
requests that do not arrive, requests that ask for an upgrade (RFC 9110 7.8: a server may ignore that, and then reads
them as HTTP/1.1), HTTP/1.0 clients (which know no chunks), and clients that close only their sending side.
"""

import asyncio
import logging
import weakref
from http import HTTPStatus
from typing import Any, Final, cast

import httptools
from uvicorn import Config
from uvicorn._types import ASGI3Application, ASGIReceiveCallable, ASGISendCallable, ASGISendEvent, Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from disagg.serve.api.failures import plain_error_response
from disagg.serve.api.http import DIRECT_WRITER
from disagg.serve.launch.half_closed import BegunTransport
from disagg.serve.launch.idle import IdleConnections

logger = logging.getLogger(__name__)

MAX_HEAD_BYTES: Final = 64 * 1024
"""Most bytes of a request line with its headers, trailers included."""
LINGER_S: Final = 2.0
"""How long a refused client may go on sending, unheard, before the connection is cut: a cut at once would take the
refusal with it."""
FIRST_REQUEST_S: Final = 0.5
"""What a client that has just connected gets to ask when the server takes no more requests."""
FLUSH_S: Final = 60.0
"""How long the last bytes of an answer may take to be read."""

_FRAMING_PER_BODY_BYTE: Final = 8
"""A chunk of one byte comes with five more."""
_HOP_BY_HOP: Final = frozenset({b"upgrade", b"http2-settings"})


class Connection(HttpToolsProtocol):
    """See the module. ``header_timeout_s`` is for one request's line and headers; bodies have the API's own deadline.

    There is one deadline at a time, in uvicorn's ``timeout_keep_alive_task``: for a request to arrive, or for the next
    to begin.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        idle: IdleConnections,
        header_timeout_s: float,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._idle = idle
        self._header_timeout_s = header_timeout_s
        self._running: RequestResponseCycle | None = None
        """What is being answered; uvicorn's ``cycle`` is the request that came last."""
        self._in_message = False
        self._in_head = False
        self._is_deaf = False
        self._is_last = False
        """The next answer is the connection's last."""
        self._is_half_closed = False
        self._num_parsed = 0
        """Bytes of the head that the parser has told of."""
        self._num_fed = 0
        """Bytes given to the parser for this message, but for those that it began with."""
        self._num_body = 0

    # From the transport ---------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a client in, if need be in the place of one that has asked for nothing."""
        super().connection_made(transport)
        self._set_deadline(self._header_timeout_s)
        if len(self.connections) > self._idle.max_connections and not self._idle.drop_oldest():
            self._is_deaf = True
            self._write_refusal(503, "the server has as many connections as it can hold: try again")
            transport.close()  # at once: it is one too many
            return
        self._idle.add(self)

    def data_received(self, data: bytes) -> None:
        """Take a part of a request, or several requests."""
        if self._is_deaf:
            return
        was_in_message = self._in_message
        try:
            self._feed(data)
        except httptools.HttpParserError as error:
            self._refuse_for(error)
            return
        if was_in_message and self._in_message:
            self._num_fed += len(data)
            if self._num_fed - self._num_body > MAX_HEAD_BYTES + _FRAMING_PER_BODY_BYTE * self._num_body:
                self._refuse_for(None)

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends no more. It is answered what it has asked in full, as far as it still reads."""
        self._is_half_closed = True
        if not self._stop_hearing():
            return False
        self._probe(BegunTransport.begin(self._running))
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell everything that is still at work for this client (uvicorn tells the request that came last)."""
        self._idle.discard(self)
        self._unset_keepalive_if_required()
        super().connection_lost(exc)
        for cycle in (self._running, *(cycle for cycle, _ in self.pipeline)):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()

    # From the parser ------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A request begins to arrive."""
        super().on_message_begin()
        self._in_message = self._in_head = True
        self._num_parsed = self._num_fed = self._num_body = 0
        self._set_deadline(self._header_timeout_s)

    def on_url(self, url: bytes) -> None:
        """Take a part of the URL."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; trailers, which nobody reads, are only counted."""
        self._count(len(name) + len(value) + len(": \r\n"))
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Begin to answer, unless the request is going to be read once more, as if it had asked for no upgrade."""
        if self.parser.should_upgrade():
            return
        super().on_headers_complete()
        self._in_head = False
        if self.parser.get_http_version() == "1.0":
            self.cycle.waiting_for_100_continue = False

    def on_body(self, body: bytes) -> None:
        """Take a part of the body."""
        self._num_body += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """A request has arrived."""
        if self.parser.should_upgrade():
            return
        self._in_message = False
        super().on_message_complete()
        if self._owes_answer():
            self._unset_keepalive_if_required()
            self._idle.discard(self)
        else:
            self._set_deadline(self.timeout_keep_alive)  # it was answered before its body had come

    # From what answers ----------------------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        """An answer is given; begin the next, or wait for a request."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._set_deadline(FLUSH_S)
        elif not self._owes_answer():
            self._idle.add(self)

    def timeout_keep_alive_handler(self) -> None:
        """A deadline has passed. Where we owe an answer, the client is not late, or its body is the API's concern."""
        if self._owes_answer() and not self.transport.is_closing():
            self._set_deadline(self._header_timeout_s)
        elif self._in_message and self._in_head and not self._is_deaf:
            self._refuse(408, f"no whole request came in {self._header_timeout_s:g} s")
        else:
            self.drop()

    def shutdown(self) -> None:
        """Take no more requests. A client that has connected and not asked yet is answered once."""
        if self._running is None and not self._is_deaf and not self.transport.is_closing():
            self._is_last = True
            self._set_deadline(FIRST_REQUEST_S)
        else:
            super().shutdown()

    def drop(self) -> None:
        """End the connection at once, whatever was not read yet."""
        self._is_deaf = True
        self.transport.abort()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        cast(dict[str, Any], cycle.scope).setdefault("extensions", {})[DIRECT_WRITER] = ChunkWriter(cycle)
        cycle.keep_alive = cycle.keep_alive and not self._is_last
        if cycle.scope["http_version"] == "1.0":
            app = _ended_by_close(cycle, app)
        super()._start_asgi_task(cycle, app)
        if self._is_half_closed:
            self._probe(BegunTransport.begin(cycle))

    # Steps ----------------------------------------------------------------------------------------------------

    def _feed(self, data: bytes) -> None:
        """Parse; a request that asks for an upgrade is parsed again without."""
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as stopped:
                data = self._without_upgrade() + data[stopped.args[0] :]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does

    def _without_upgrade(self) -> bytes:
        method = self.parser.get_method()
        if method == b"CONNECT":
            raise httptools.HttpParserInvalidMethodError("CONNECT: this server is no proxy")
        lines = [b"%b %b HTTP/%b" % (method, self.url, self.parser.get_http_version().encode())]
        for name, value in self.headers:
            if name == b"connection":
                tokens = [token.strip() for token in value.split(b",")]
                value = b", ".join(token for token in tokens if token.lower() not in _HOP_BY_HOP)
            if name not in _HOP_BY_HOP:
                lines.append(b"%b: %b" % (name, value))
        return b"\r\n".join([*lines, b"", b""])

    def _count(self, num_bytes: int) -> None:
        self._num_parsed += num_bytes
        if self._num_parsed > MAX_HEAD_BYTES:
            raise httptools.HttpParserError("the head of a request is too long")

    def _owes_answer(self) -> bool:
        running = self._running
        return bool(self.pipeline) or not (running is None or running.response_complete or running.disconnected)

    def _stop_hearing(self) -> bool:
        """Take no more requests. True where earlier ones are to be answered; the last answer closes the connection."""
        was_deaf, self._is_deaf = self._is_deaf, True
        if self._in_message and not self._in_head and not was_deaf:  # its body will never be complete
            if self.cycle is self._running:
                return False
            self.pipeline.popleft()
        if not self._owes_answer():
            return False
        newest = self.pipeline[0][0] if self.pipeline else self._running
        assert newest is not None, "an answer is owed to somebody"
        newest.keep_alive = False
        return True

    def _refuse_for(self, error: httptools.HttpParserError | None) -> None:
        if error is None or self._num_parsed > MAX_HEAD_BYTES:
            self._refuse(431, f"the request line, headers and trailers may have {MAX_HEAD_BYTES} bytes together")
        else:
            self._refuse(400, "the request is not valid HTTP/1.1")

    def _refuse(self, status: int, message: str) -> None:
        """Answer what cannot be read, where it is next to be answered, and hear no more."""
        if self._stop_hearing():
            return
        broken = self._running
        if broken is not None and not broken.response_complete:
            broken.disconnected = True
            broken.message_event.set()
            if broken.response_started:
                self.transport.close()
                return
        elif self._in_message and not self._in_head:  # answered already, only its body was still on its way
            self.transport.close()
            return
        self._write_refusal(status, message)

    def _write_refusal(self, status: int, message: str) -> None:
        body = bytes(plain_error_response(status, message).body)
        lines = [
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
            "content-type: application/json",
            f"content-length: {len(body)}",
            "connection: close",
            *(["retry-after: 1"] if status == HTTPStatus.SERVICE_UNAVAILABLE else []),
        ]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self.transport.write_eof()
        self._set_deadline(LINGER_S)
        logger.debug("refused status=%d: %s", status, message)

    def _set_deadline(self, timeout_s: float) -> None:
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(timeout_s, self.timeout_keep_alive_handler)

    def _probe(self, begun: BegunTransport) -> None:
        """Send a byte ahead, and more later, until the answer is complete or the client is known to have gone."""
        if begun.is_needed():
            self.loop.call_later(begun.probe(), self._probe, begun)


class ChunkWriter:
    """The ``DirectWriter`` of a response: writes chunks as uvicorn does."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = weakref.proxy(cycle)  # whose scope holds this

    def is_ready(self) -> bool:
        """See DirectWriter."""
        cycle = self._cycle
        is_open = bool(cycle.chunked_encoding) and not cycle.response_complete  # the former is known once it has begun
        return is_open and not (cycle.flow.write_paused or cycle.disconnected)

    def write(self, body: bytes) -> None:
        """See DirectWriter."""
        self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(body), body))


def _ended_by_close(cycle: RequestResponseCycle, app: ASGI3Application) -> ASGI3Application:
    """Let a response without a length end with the connection, as HTTP/1.0 has it."""

    async def answer(scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        has_length = True

        async def send_plainly(message: ASGISendEvent) -> None:
            nonlocal has_length
            if message["type"] == "http.response.start":
                has_length = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
                if not has_length:
                    cycle.chunked_encoding = False
            elif message["type"] == "http.response.body" and not has_length:
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await app(scope, receive, send_plainly)

    return answer
