"""The engine's end of the control plane: a ZeroMQ DEALER socket for each router, and a way to wake its reader.

The first router is the one that the instance was started for. Where that one only keeps the fleet, it names the others
(``JoinRouter``): then what is about a sequence goes to the router whose sequence it is, and everything else to all.
"""

import logging
import math
import os
from typing import Final

import zmq

from disagg.base.config import CurveKeys
from disagg.base.errors import InternalError, ProtocolError
from disagg.base.ids import InstanceId, RouterId, owner_of
from disagg.base.message_fields import HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS, MAX_MESSAGE_BYTES, Message
from disagg.base.messages import (
    Failed,
    NotHeld,
    Offered,
    PartOffered,
    Pulled,
    SequenceOutput,
    StepOutput,
    ToEngine,
    decode_for_engine,
    encode,
)
from disagg.base.router_messages import SAME_HOST

FIRST_ROUTER: Final = RouterId("")
SEND_DEADLINE_S: Final = 10.0
"""A router that takes nothing for this long, with a full queue, counts as gone."""
MAX_QUEUED_MESSAGES: Final = 100_000
MAX_MESSAGES_AT_ONCE: Final = 1024
LINGER_MS: Final = 500
_READABLE: Final = int(zmq.POLLIN)
"""As a plain number: an enum's operators are Python code, and this is asked before every step."""

logger = logging.getLogger(__name__)


class ControlChannel:
    """Messages from and to the routers. All methods but ``wake`` belong to the thread that made it."""

    def __init__(
        self, endpoint: str, instance: InstanceId, key: str | None = None, curve: CurveKeys | None = None
    ) -> None:
        """Connect; the router knows the socket by the instance's name, and lets it in for the server's key, or keys."""
        self._context = zmq.Context()
        self._instance = instance
        self._key = key
        self._curve = curve
        self._endpoint = endpoint
        self._alarm = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller = zmq.Poller()
        self._poller.register(self._alarm, zmq.POLLIN)
        self._first = self._connect(endpoint)
        self._others: dict[RouterId, zmq.Socket[bytes]] = {}

    @property
    def routers(self) -> tuple[RouterId, ...]:
        """All routers, the first one included; none where that is the only one."""
        return (FIRST_ROUTER, *self._others) if self._others else ()

    def join(self, router: RouterId, endpoint: str) -> None:
        """Connect to one more router; for ``endpoint`` see ``JoinRouter``."""
        self.leave(router)
        if endpoint.startswith(SAME_HOST):
            endpoint = self._endpoint.rpartition(":")[0] + ":" + endpoint.removeprefix(SAME_HOST)
        self._others[router] = self._connect(endpoint)

    def leave(self, router: RouterId) -> None:
        """Forget a router, and what it was not sent yet; nothing happens where it is not known."""
        socket = self._others.pop(router, None)
        if socket is not None:
            self._poller.unregister(socket)
            socket.close(linger=0)

    def send(self, message: Message) -> None:
        """Queue a message for whom it concerns; raise InternalError when the first router has long taken none."""
        if not self._others:
            self._send_first(message)
            return
        match message:
            case StepOutput(outputs=outputs):
                self._send_outputs(outputs)
            case Offered(offer=about) | PartOffered(offer=about):
                self.send_to(owner_of(about.request_id), message)
            case NotHeld(request_id=request_id) | Pulled(request_id=request_id) | Failed(request_id=request_id):
                self.send_to(owner_of(request_id), message)
            case _:
                for router in self.routers:
                    self.send_to(router, message)

    def send_to(self, router: RouterId, message: Message) -> None:
        """Queue a message for one router; it is dropped where that one is gone, or has long taken none."""
        if router == FIRST_ROUTER:
            self._send_first(message)
        elif (socket := self._others.get(router)) is not None:
            try:
                socket.send(encode(message), zmq.NOBLOCK)
            except zmq.Again:
                logger.error("router %s has left %d messages unread and gets no more", router, MAX_QUEUED_MESSAGES)
                self.leave(router)

    def receive(self, timeout_s: float) -> list[ToEngine]:
        """Wait until a message, a ``wake`` or the timeout, then return what is there; the rest comes next time."""
        if timeout_s > 0.0:
            self._wait(timeout_s)
        messages: list[ToEngine] = []
        for socket in (self._first, *self._others.values()) if self._others else (self._first,):
            self._take(socket, messages)
        return messages

    def wake(self) -> None:
        """Make a waiting ``receive`` return. Safe from any thread and from a signal handler."""
        os.eventfd_write(self._alarm, 1)

    def close(self) -> None:
        """Send what is queued, for half a second at most, and close."""
        for socket in (self._first, *self._others.values()):
            socket.close()
        self._context.term()
        os.close(self._alarm)

    def _connect(self, endpoint: str) -> "zmq.Socket[bytes]":
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.ROUTING_ID, self._instance.encode())
        if self._key is not None:
            socket.setsockopt(zmq.PLAIN_USERNAME, self._instance.encode())
            socket.setsockopt(zmq.PLAIN_PASSWORD, self._key.encode())
        if self._curve is not None:
            socket.setsockopt(zmq.CURVE_SERVERKEY, self._curve.server_public.encode())
            socket.setsockopt(zmq.CURVE_PUBLICKEY, self._curve.public.encode())
            socket.setsockopt(zmq.CURVE_SECRETKEY, self._curve.secret.encode())
            socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
            socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
        socket.setsockopt(zmq.LINGER, LINGER_MS)
        socket.setsockopt(zmq.SNDTIMEO, int(SEND_DEADLINE_S * 1000))
        socket.setsockopt(zmq.SNDHWM, MAX_QUEUED_MESSAGES)
        socket.setsockopt(zmq.RCVHWM, MAX_QUEUED_MESSAGES)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        socket.connect(endpoint)
        self._poller.register(socket, zmq.POLLIN)
        return socket

    def _send_first(self, message: Message) -> None:
        try:
            self._first.send(encode(message))
        except zmq.Again:
            raise InternalError(f"the router took no message for {SEND_DEADLINE_S:.0f} s") from None

    def _send_outputs(self, outputs: tuple[SequenceOutput, ...]) -> None:
        """Send each router its part of what a step brought."""
        parts: dict[RouterId, list[SequenceOutput]] = {}
        for output in outputs:
            parts.setdefault(owner_of(output.request_id), []).append(output)
        for router, part in parts.items():
            self.send_to(router, StepOutput(outputs=tuple(part)))

    def _take(self, socket: "zmq.Socket[bytes]", messages: list[ToEngine]) -> None:
        """Add what has come from one router."""
        # Between steps mostly nothing is there, and asking costs less than trying.
        for _ in range(MAX_MESSAGES_AT_ONCE):
            if not int(socket.get(zmq.EVENTS)) & _READABLE:
                return
            try:
                messages.append(decode_for_engine(socket.recv(zmq.NOBLOCK)))
            except zmq.Again:
                return
            except ProtocolError as error:
                logger.error("ignored a message: %s", error)

    def _wait(self, timeout_s: float) -> None:
        """Wait for a message or a ``wake``. One from a busy time, which nobody waited for, ends a wait early once."""
        ready = dict(self._poller.poll(math.ceil(timeout_s * 1000)))
        if self._alarm in ready:
            os.eventfd_read(self._alarm)
