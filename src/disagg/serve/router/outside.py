"""Instances on other hosts: their hosts ask to join over TCP, and are admitted under a name or refused in words.

An ``OutsideDoor`` stands beside the ipc socket of local instances. What comes from an admitted instance goes where
local instances' messages go; what comes from a host is answered here. Names are kept apart: nobody outside can speak
for a local instance, nor for one of another host without its key.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from typing import Protocol

from disagg.base.errors import ConfigurationError, ProtocolError, UnavailableError
from disagg.base.ids import InstanceId
from disagg.base.joining import (
    HOST_PREFIX,
    Admitted,
    AskToJoin,
    AskToLeave,
    EndYourInstance,
    InstanceEnded,
    ModelIdentity,
    NotAdmitted,
    ServerTerms,
    StillHere,
    decode_from_host,
)
from disagg.base.message_fields import PROTOCOL_VERSION, Message
from disagg.base.messages import InstanceFacts, encode
from disagg.base.request import Role
from disagg.serve.router.control_socket import ControlSocket, Receiver
from disagg.serve.router.watcher import InstanceWatcher

logger = logging.getLogger(__name__)


class MemberListener(Protocol):
    """The router's side: who belongs to the deployment."""

    def instance_joined(self, instance: InstanceId, role: Role) -> None:
        """An instance is about to start on another host; raise ConfigurationError when it cannot belong."""

    def instance_asks_to_leave(self, instance: InstanceId) -> None:
        """Its host is to stop: let it give away what it holds. Raise ConfigurationError when it does so already."""

    def instance_left(self, instance: InstanceId) -> None:
        """It does not belong any more; what it held is lost."""

    def instance_returns(self, instance: InstanceId, detail: str) -> None:
        """Its process is gone, and another one starts; what it held is lost."""

    def has_instance(self, instance: InstanceId) -> bool:
        """True while an instance of this name belongs to the deployment."""

    def takes_requests(self, instance: InstanceId) -> bool:
        """True while an instance of the deployment is ready, and does not drain."""


class ListeningSocket(ControlSocket, Protocol):
    """One that has an address of its own."""

    @property
    def address(self) -> str:
        """HOST:PORT, once it is open."""


@dataclass(frozen=True, slots=True)
class _Guest:
    """One admitted instance, and what to call its host on the socket and in words.

    The host of one that is to return has no name on the socket until it asks again.
    """

    socket_name: InstanceId | None
    host: str
    role: Role


class OutsideDoor:
    """Admits hosts. ``listener`` is set before it is opened."""

    listener: MemberListener

    def __init__(self, socket: ListeningSocket, identity: ModelIdentity, terms: ServerTerms) -> None:
        self._socket = socket
        self._identity = identity
        self._terms = terms
        self._guests: dict[InstanceId, _Guest] = {}

    def __contains__(self, instance: InstanceId) -> bool:
        return instance in self._guests

    def open(self, receive: Receiver) -> None:
        """Listen; ``receive`` gets what admitted instances say. Raises ConfigurationError when that is impossible."""
        self._receive = receive
        self._socket.open(self._take)
        logger.info("instances on other hosts join at tcp://%s", self.address)

    def send(self, instance: InstanceId, data: bytes) -> None:
        """See ControlSocket."""
        self._socket.send(instance, data)

    def close(self) -> None:
        """See ControlSocket."""
        self._socket.close()

    def turn_out(self, instance: InstanceId, why: str) -> None:
        """Have an instance that is broken ended, if its host can be reached, and await the next one; not for ever.

        One that is awaited already, and did not come in the time that an instance may take to start, is let go.
        """
        guest = self._guests[instance]
        if guest.socket_name is None:
            self._let_go(instance, why)
            return
        self._tell(guest, EndYourInstance(why=why))
        self._ended(instance, why, returns=True)

    def forget(self, instance: InstanceId) -> None:
        """Await no more who does not belong any more."""
        self._guests.pop(instance, None)

    def see_off(self, instance: InstanceId) -> None:
        """Let go of an instance that holds nothing any more and was to leave."""
        guest = self._guests.pop(instance)
        logger.info("%s on %s leaves", instance, guest.host)
        self._tell(guest, EndYourInstance(why="it was removed, and holds nothing any more", for_good=True))
        self.listener.instance_left(instance)

    def expect(self, role: Role, host: str) -> InstanceId:
        """Let one more instance belong to the deployment, which somebody starts elsewhere, and return its name."""
        instance = self._free_name(role)
        self.listener.instance_joined(instance, role)
        self._guests[instance] = _Guest(None, host, role)
        return instance

    def lost(self, instance: InstanceId, why: str, *, returns: bool) -> None:
        """Take note that an instance is gone, as somebody who watches its host says, and whether it is to return."""
        if instance in self._guests:
            self._ended(instance, why, returns=returns)

    @property
    def address(self) -> str:
        """HOST:PORT at which it listens, once it is open."""
        return self._socket.address

    def host_of(self, instance: InstanceId) -> str:
        """Return in words where an admitted instance is."""
        return self._guests[instance].host

    def _take(self, sender: InstanceId, data: bytes) -> None:
        guest = self._guests.get(sender)
        if guest is not None and guest.socket_name is not None:
            self._receive(sender, data)
        elif sender.startswith(HOST_PREFIX):
            self._take_from_host(sender, data)
        else:
            logger.debug("a message from %r outside, which is not admitted, was dropped", sender)

    def _take_from_host(self, sender: InstanceId, data: bytes) -> None:
        try:
            message = decode_from_host(data)
        except ProtocolError as error:
            logger.warning("a message from %s was dropped: %s", sender, error)
            self._answer(sender, NotAdmitted(why=f"the server does not understand this host: {error}"))
            return
        instance = next((name for name, guest in self._guests.items() if guest.socket_name == sender), None)
        match message:
            case AskToJoin():
                if instance is not None:
                    self._let_go(instance, "its host asks to join anew")
                self._answer(sender, self._admit(sender, message))
            case StillHere():
                self._answer(sender, self._reply_to(instance))
            case AskToLeave():
                if instance is not None:
                    self._let_leave(instance)
            case InstanceEnded(detail=detail, returns=returns):
                if instance is not None:
                    self._ended(instance, detail, returns=returns)

    def _reply_to(self, instance: InstanceId | None) -> StillHere | EndYourInstance:
        if instance is None:
            return EndYourInstance(why="the server does not know it")
        return StillHere(takes_requests=self.listener.takes_requests(instance))

    def _admit(self, sender: InstanceId, asked: AskToJoin) -> Admitted | NotAdmitted:
        why = self._why_not(asked)
        instance = self._returning(asked)
        if not why and instance is None:
            instance = self._free_name(asked.role, asked.name)
            try:
                self.listener.instance_joined(instance, asked.role)
            except ConfigurationError as error:
                why = str(error)
        if why:
            logger.warning("a %s instance on %s was not admitted: %s", asked.role.value, asked.host, why)
            return NotAdmitted(why=why)
        assert instance is not None, "it has a name by now"
        self._guests[instance] = _Guest(sender, asked.host, asked.role)
        logger.info("%s on %s joins", instance, asked.host)
        return Admitted(instance=instance, terms=self._terms)

    def _why_not(self, asked: AskToJoin) -> str:
        if asked.version != PROTOCOL_VERSION:
            return (
                f"another protocol: the server speaks version {PROTOCOL_VERSION}, this host {asked.version} "
                f"(disagg {asked.release}); install the same release on both"
            )
        return self._identity.why_not(asked.model)

    def _returning(self, asked: AskToJoin) -> InstanceId | None:
        """Return the name of the awaited instance that asks."""
        return next(
            (
                name
                for name, guest in self._guests.items()
                if name == asked.name and guest.socket_name is None and guest.role is asked.role
            ),
            None,
        )

    def _free_name(self, role: Role, wish: str | None = None) -> InstanceId:
        numbered = (InstanceId(f"{role.value}-{number}") for number in count())
        wished = [] if wish is None or wish.startswith(HOST_PREFIX) else [InstanceId(wish)]
        return next(name for name in chain(wished, numbered) if not self.listener.has_instance(name))

    def _let_leave(self, instance: InstanceId) -> None:
        logger.info("the host of %s is to stop: its answers move to others", instance)
        try:
            self.listener.instance_asks_to_leave(instance)
        except ConfigurationError as error:
            logger.debug("%s", error)

    def _let_go(self, instance: InstanceId, detail: str) -> None:
        guest = self._guests.pop(instance)
        logger.warning("%s on %s left: %s", instance, guest.host, detail)
        self.listener.instance_left(instance)

    def _ended(self, instance: InstanceId, detail: str, *, returns: bool) -> None:
        if not returns:
            self._let_go(instance, detail)
            return
        guest = self._guests[instance]
        logger.warning("%s on %s ended: %s; it is to return", instance, guest.host, detail)
        self._guests[instance] = _Guest(None, guest.host, guest.role)
        self.listener.instance_returns(instance, detail)
        if not self.listener.has_instance(instance):  # it was to leave
            self.forget(instance)

    def _tell(self, guest: _Guest, message: Message) -> None:
        if guest.socket_name is not None:
            self._answer(guest.socket_name, message)

    def _answer(self, sender: InstanceId, message: Message) -> None:
        try:
            self._socket.send(sender, encode(message))
        except UnavailableError as error:
            logger.debug("no answer could be sent to %s: %s", sender, error)


class KnownGuests:
    """The door of a router that admits nobody itself: it is told which instances are on other hosts."""

    def __init__(self, socket: ListeningSocket, guests: Iterable[InstanceId]) -> None:
        self._socket = socket
        self._guests = set(guests)

    def __contains__(self, instance: InstanceId) -> bool:
        return instance in self._guests

    def add(self, instance: InstanceId) -> None:
        """Hear an instance from now on."""
        self._guests.add(instance)

    def discard(self, instance: InstanceId) -> None:
        """Hear an instance no more."""
        self._guests.discard(instance)

    def open(self, receive: Receiver) -> None:
        """See ControlSocket."""
        self._receive = receive
        self._socket.open(self._take)

    def send(self, instance: InstanceId, data: bytes) -> None:
        """See ControlSocket."""
        self._socket.send(instance, data)

    def close(self) -> None:
        """See ControlSocket."""
        self._socket.close()

    @property
    def port(self) -> int:
        """Where it listens, once it is open."""
        return int(self._socket.address.rpartition(":")[2])

    def _take(self, sender: InstanceId, data: bytes) -> None:
        if sender in self._guests:
            self._receive(sender, data)
        else:
            logger.debug("a message from %r outside, which is no instance of this server, was dropped", sender)


class TwoDoors:
    """The control socket of a router that has instances here and on other hosts."""

    def __init__(self, inside: ControlSocket, outside: OutsideDoor | KnownGuests) -> None:
        self._inside = inside
        self._outside = outside

    def open(self, receive: Receiver) -> None:
        """See ControlSocket."""
        self._inside.open(partial(self._receive_inside, receive))
        self._outside.open(receive)

    def send(self, instance: InstanceId, data: bytes) -> None:
        """See ControlSocket."""
        (self._outside if instance in self._outside else self._inside).send(instance, data)

    def close(self) -> None:
        """See ControlSocket."""
        self._inside.close()
        self._outside.close()

    def _receive_inside(self, receive: Receiver, instance: InstanceId, data: bytes) -> None:
        if instance in self._outside:
            logger.warning("a local process speaks as %s, which is on another host: dropped", instance)
            return
        receive(instance, data)


class TwoWatchers:
    """Tells whoever runs the local instances about those, and the hosts of the others about theirs."""

    def __init__(self, local: InstanceWatcher, outside: OutsideDoor) -> None:
        self._local = local
        self._outside = outside

    def instance_loading(self, instance: InstanceId, stage: str, fraction: float) -> None:
        """See InstanceWatcher."""
        if instance not in self._outside:
            self._local.instance_loading(instance, stage, fraction)

    def instance_ready(self, instance: InstanceId, facts: InstanceFacts) -> None:
        """See InstanceWatcher."""
        if instance in self._outside:
            logger.info("%s on %s takes requests", instance, self._outside.host_of(instance))
        else:
            self._local.instance_ready(instance, facts)

    def instance_faulty(self, instance: InstanceId, why: str) -> None:
        """See InstanceWatcher."""
        if instance in self._outside:
            self._outside.turn_out(instance, why)
        else:
            self._local.instance_faulty(instance, why)

    def restart_instance(self, instance: InstanceId, delay_s: float) -> None:
        """See InstanceWatcher: what is on another host is started again there."""
        if instance not in self._outside:
            self._local.restart_instance(instance, delay_s)

    def give_up_instance(self, instance: InstanceId, nothing_left: bool) -> None:
        """See InstanceWatcher."""
        if instance not in self._outside:
            self._local.give_up_instance(instance, nothing_left)

    def instance_drained(self, instance: InstanceId) -> None:
        """See InstanceWatcher: nobody waits for it."""

    def instance_leaving(self, instance: InstanceId) -> None:
        """See InstanceWatcher: what is on another host is ended there."""
        if instance in self._outside:
            self._outside.see_off(instance)
        else:
            self._local.instance_leaving(instance)

    def instance_left(self, instance: InstanceId) -> None:
        """See InstanceWatcher. One that was awaited can have been to leave."""
        if instance in self._outside:
            self._outside.forget(instance)
        else:
            self._local.instance_left(instance)
