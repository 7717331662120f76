"""Who may speak on the control socket: ZeroMQ asks before it lets a connection say its first message.

On one host PLAIN rather than CURVE: the socket is a file that only this user can open, so there is nobody to hide
messages from, and to encrypt each would cost more than to check a connection. Between hosts CURVE. Rather than a token
in the messages, because a stranger with an instance's name would have taken over its place in the ROUTER socket before
the first message was read.
"""

import asyncio
import hmac
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import zmq
from zmq.utils import z85

from disagg.base.message_fields import HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS

logger = logging.getLogger(__name__)

_ENDPOINT: Final = "inproc://zeromq.zap.01"
_VERSION: Final = b"1.0"
_NUM_FIXED_FRAMES: Final = 6
"""Version, request id, domain, address, identity, mechanism; the credentials follow: ZeroMQ RFC 27."""


class Guard(Protocol):
    """Says who may connect."""

    def prepare(self, socket: "zmq.Socket[bytes]") -> None:
        """Set what the listening socket needs."""

    def admits(self, mechanism: bytes, credentials: Sequence[bytes]) -> bool:
        """True when this connection may speak."""


@dataclass(frozen=True, slots=True)
class SharedKey:
    """Lets in whoever gives ``key`` as a password: new at every start, and known to the server's instances alone."""

    key: str

    def prepare(self, socket: "zmq.Socket[bytes]") -> None:
        """See Guard."""
        socket.setsockopt(zmq.PLAIN_SERVER, 1)

    def admits(self, mechanism: bytes, credentials: Sequence[bytes]) -> bool:
        """See Guard."""
        return (
            mechanism == b"PLAIN" and len(credentials) == 2 and hmac.compare_digest(credentials[1], self.key.encode())
        )


@dataclass(frozen=True, slots=True)
class CurveGuard:
    """Encrypts, and lets in whoever has the secret of one of the public keys ``admitted`` (in Z85)."""

    secret_key: bytes
    admitted: frozenset[bytes]

    def prepare(self, socket: "zmq.Socket[bytes]") -> None:
        """See Guard."""
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self.secret_key)
        socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)

    def admits(self, mechanism: bytes, credentials: Sequence[bytes]) -> bool:
        """See Guard."""
        return mechanism == b"CURVE" and len(credentials) == 1 and z85.encode(credentials[0]) in self.admitted


class Doorkeeper:
    """Answers the authentication requests (ZAP) of one ZeroMQ context, on the running event loop."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", guard: Guard) -> None:
        self._guard = guard
        self._loop = asyncio.get_running_loop()
        self._socket = context.socket(zmq.REP)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(_ENDPOINT)
        descriptor = self._socket.getsockopt(zmq.FD)
        assert isinstance(descriptor, int), "the option is a file descriptor"
        self._descriptor = descriptor
        self._loop.add_reader(descriptor, self._drain)

    def close(self) -> None:
        """Let nobody in any more."""
        self._loop.remove_reader(self._descriptor)
        self._socket.close()

    def _drain(self) -> None:
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._socket.send_multipart(self._reply(frames))

    def _reply(self, frames: list[bytes]) -> list[bytes]:
        request_id = frames[1] if len(frames) > 1 else b""
        if len(frames) >= _NUM_FIXED_FRAMES and self._guard.admits(frames[5], frames[_NUM_FIXED_FRAMES:]):
            return [_VERSION, request_id, b"200", b"", b"", b""]
        address = frames[3].decode(errors="replace") if len(frames) > 3 else ""
        logger.warning("a stranger%s was turned away from the control socket", f" at {address}" if address else "")
        return [_VERSION, request_id, b"400", b"not the key of this server", b"", b""]
