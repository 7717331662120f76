"""Who may speak on the control socket: ZeroMQ asks before it lets a connection say its first message.

PLAIN rather than CURVE: the socket is a file that only this user can open, so there is nobody to hide messages from,
and to encrypt each would cost more than to check a connection. Rather than a token in the messages, because a stranger
with an instance's name would have taken over its place in the ROUTER socket before the first message was read.
"""

import asyncio
import hmac
import logging
from typing import Final

import zmq

logger = logging.getLogger(__name__)

_ENDPOINT: Final = "inproc://zeromq.zap.01"
_VERSION: Final = b"1.0"
_NUM_FRAMES: Final = 8
"""Version, request id, domain, address, identity, mechanism, user name, password: ZeroMQ RFC 27."""


class Doorkeeper:
    """Answers the authentication requests (ZAP) of one ZeroMQ context, on the running event loop.

    A connection is let in when its password is ``key``, which is new at every start and known to the instances alone.
    """

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", key: str) -> None:
        self._key = key.encode()
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
        if len(frames) == _NUM_FRAMES and frames[5] == b"PLAIN" and hmac.compare_digest(frames[7], self._key):
            return [_VERSION, request_id, b"200", b"", b"", b""]
        logger.warning("a stranger was turned away from the control socket")
        return [_VERSION, request_id, b"400", b"not the key of this server", b"", b""]
