"""The router's end of the control plane: one ZeroMQ ROUTER socket that all instances connect to.

Whatever carries the messages is behind ``ControlSocket``: ipc on one host, tcp with CURVE keys between hosts.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Final, Protocol

import zmq

from disagg.base.errors import ConfigurationError, UnavailableError
from disagg.base.ids import InstanceId
from disagg.base.message_fields import MAX_MESSAGE_BYTES
from disagg.serve.router.doorkeeper import Doorkeeper, Guard

logger = logging.getLogger(__name__)

Receiver = Callable[[InstanceId, bytes], None]
"""Takes one message and the instance that it came from. A message that was not one frame arrives empty."""

MAX_QUEUED_MESSAGES: Final = 8192
"""Messages that may wait for one instance, and from one instance, before the socket refuses more."""

_MESSAGES_AT_ONCE: Final = 256
"""Messages handled before other work of the event loop gets its turn."""
_READABLE: Final = int(zmq.POLLIN)
"""As a plain number: an enum's operators are Python code."""


class ControlSocket(Protocol):
    """Datagrams to and from named instances."""

    def open(self, receive: Receiver) -> None:
        """Start to listen; ``receive`` is called on the running event loop. Raise ConfigurationError if impossible."""

    def send(self, instance: InstanceId, data: bytes) -> None:
        """Queue one message without waiting; raise UnavailableError when the instance is not there or does not read."""

    def close(self) -> None:
        """Stop to listen and forget what is queued. May be called twice."""


class ZmqControlSocket:
    """A ROUTER socket on an event loop, without a task: it is read when its descriptor says so, and after each send.

    With a ``guard``, only those that it admits are heard; without, whoever can open the endpoint.

    (A send may swallow the descriptor's signal for a message that arrived meanwhile; ZeroMQ's is edge-triggered.)
    """

    def __init__(self, endpoint: str, guard: Guard | None = None) -> None:
        self._endpoint = endpoint
        self._guard = guard
        self._doorkeeper: Doorkeeper | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._descriptor: int | None = None
        self._drain_scheduled = False

    def open(self, receive: Receiver) -> None:
        """See ControlSocket."""
        self._receive = receive
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        if self._guard is not None:
            self._doorkeeper = Doorkeeper(self._context, self._guard)
            self._guard.prepare(self._socket)
            self._socket.setsockopt(zmq.ZAP_DOMAIN, b"control")
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES),
            (zmq.SNDHWM, MAX_QUEUED_MESSAGES),
            (zmq.RCVHWM, MAX_QUEUED_MESSAGES),
            (zmq.ROUTER_MANDATORY, 1),  # a send to an absent instance is an error, not silence
            (zmq.ROUTER_HANDOVER, 1),  # a restarted instance takes over its name at once
        ):
            self._socket.setsockopt(option, value)
        try:
            self._socket.bind(self._endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigurationError(f"cannot listen for instances on {self._endpoint}: {error}") from error
        descriptor = self._socket.getsockopt(zmq.FD)
        assert isinstance(descriptor, int), "the option is a file descriptor"
        self._descriptor = descriptor
        self._loop.add_reader(descriptor, self._drain)

    @property
    def address(self) -> str:
        """What follows the scheme of its endpoint, with the port that the system chose."""
        bound = self._socket.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(bound, bytes), "the option is an address"
        return bound.rstrip(b"\0").decode().partition("://")[2]

    def send(self, instance: InstanceId, data: bytes) -> None:
        """See ControlSocket."""
        try:
            self._socket.send_multipart((instance.encode(), data), zmq.NOBLOCK)
        except zmq.Again:
            raise UnavailableError(f"{instance} has left {MAX_QUEUED_MESSAGES} messages unread") from None
        except zmq.ZMQError as error:
            raise UnavailableError(f"{instance} is not connected: {error}") from error
        self._schedule_drain()

    def close(self) -> None:
        """See ControlSocket."""
        if self._context is None:
            return
        if self._descriptor is not None:
            self._loop.remove_reader(self._descriptor)
        self._socket.close()
        if self._doorkeeper is not None:
            self._doorkeeper.close()
        self._context.term()
        self._context = None

    def _schedule_drain(self) -> None:
        if not self._drain_scheduled:
            self._drain_scheduled = True
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        self._drain_scheduled = False
        for _ in range(_MESSAGES_AT_ONCE):
            # Asking costs less than the exception of trying in vain.
            if self._context is None or not int(self._socket.get(zmq.EVENTS)) & _READABLE:
                return
            try:
                identity, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            data = frames[0] if len(frames) == 1 else b""
            try:
                self._receive(InstanceId(identity.decode(errors="replace")), data)
            except BaseException:
                self._schedule_drain()  # the messages behind this one are not forgotten
                raise
        self._schedule_drain()
