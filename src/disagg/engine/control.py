"""The engine's end of the control plane: one ZeroMQ DEALER socket, and a way for other threads to wake its reader."""

import logging
import math
import os
from typing import Final

import zmq

from disagg.base.config import CurveKeys
from disagg.base.errors import InternalError, ProtocolError
from disagg.base.ids import InstanceId
from disagg.base.messages import (
    HEARTBEAT_MS,
    HEARTBEAT_TIMEOUT_MS,
    MAX_MESSAGE_BYTES,
    Message,
    ToEngine,
    decode_for_engine,
    encode,
)

SEND_DEADLINE_S: Final = 10.0
"""A router that takes nothing for this long, with a full queue, counts as gone."""
MAX_QUEUED_MESSAGES: Final = 100_000
MAX_MESSAGES_AT_ONCE: Final = 1024
LINGER_MS: Final = 500

logger = logging.getLogger(__name__)


class ControlChannel:
    """Messages from and to the router. All methods but ``wake`` belong to the thread that made it."""

    def __init__(
        self, endpoint: str, instance: InstanceId, key: str | None = None, curve: CurveKeys | None = None
    ) -> None:
        """Connect; the router knows the socket by the instance's name, and lets it in for the server's key, or keys."""
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.ROUTING_ID, instance.encode())
        if key is not None:
            self._socket.setsockopt(zmq.PLAIN_USERNAME, instance.encode())
            self._socket.setsockopt(zmq.PLAIN_PASSWORD, key.encode())
        if curve is not None:
            self._socket.setsockopt(zmq.CURVE_SERVERKEY, curve.server_public.encode())
            self._socket.setsockopt(zmq.CURVE_PUBLICKEY, curve.public.encode())
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, curve.secret.encode())
            self._socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
            self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.setsockopt(zmq.SNDTIMEO, int(SEND_DEADLINE_S * 1000))
        self._socket.setsockopt(zmq.SNDHWM, MAX_QUEUED_MESSAGES)
        self._socket.setsockopt(zmq.RCVHWM, MAX_QUEUED_MESSAGES)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._socket.connect(endpoint)
        self._alarm = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._alarm, zmq.POLLIN)

    def send(self, message: Message) -> None:
        """Queue a message; raise InternalError when the router has long stopped taking any."""
        try:
            self._socket.send(encode(message))
        except zmq.Again:
            raise InternalError(f"the router took no message for {SEND_DEADLINE_S:.0f} s") from None

    def receive(self, timeout_s: float) -> list[ToEngine]:
        """Wait until a message, a ``wake`` or the timeout, then return what is there; the rest comes next time."""
        if timeout_s > 0.0:
            self._wait(timeout_s)
        messages: list[ToEngine] = []
        # Between steps mostly nothing is there, and asking costs less than trying.
        while len(messages) < MAX_MESSAGES_AT_ONCE and self._has_message():
            try:
                messages.append(decode_for_engine(self._socket.recv(zmq.NOBLOCK)))
            except zmq.Again:
                break
            except ProtocolError as error:
                logger.error("ignored a message: %s", error)
        return messages

    def _has_message(self) -> bool:
        return bool(int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN)

    def _wait(self, timeout_s: float) -> None:
        """Wait for a message or a ``wake``. One from a busy time, which nobody waited for, ends a wait early once."""
        ready = dict(self._poller.poll(math.ceil(timeout_s * 1000)))
        if self._alarm in ready:
            os.eventfd_read(self._alarm)

    def wake(self) -> None:
        """Make a waiting ``receive`` return. Safe from any thread and from a signal handler."""
        os.eventfd_write(self._alarm, 1)

    def close(self) -> None:
        """Send what is queued, for half a second at most, and close."""
        self._socket.close()
        self._context.term()
        os.close(self._alarm)
