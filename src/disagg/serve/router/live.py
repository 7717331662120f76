"""The live router: the API submits sequences to it, instances and their launcher report to it.

Everything happens on one event loop, in the order in which it arrives; no method waits for an instance. It decides
nothing: ``scheduling.router.core`` does.
"""

import asyncio
import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from disagg.base.clock import Clock, MonotonicClock
from disagg.base.config import RouterSettings, SchedulerSettings
from disagg.base.errors import ConfigurationError, DisaggError, InternalError, ProtocolError, UnavailableError
from disagg.base.event_log import EventLog
from disagg.base.ids import InstanceId, RequestId, RouterId
from disagg.base.messages import Audited, KvEvents, Loading, Ready, StepOutput, decode_for_router, encode
from disagg.base.request import GenerationRequest, Role
from disagg.scheduling.dispatch.events import Drain, Join, Leave, ProcessStarting
from disagg.scheduling.dispatch.state import InstanceState
from disagg.scheduling.router.core import RouterCore
from disagg.scheduling.router.elastic_view import ElasticView
from disagg.scheduling.router.elasticity import AnyElasticNews
from disagg.scheduling.router.header import RouterHeader, RouterPart
from disagg.scheduling.router.inputs import (
    AnyCommand,
    InstanceSaid,
    MalformedMessage,
    MeasureLinks,
    ProcessExited,
)
from disagg.scheduling.router.link_survey import MeasuredLink
from disagg.scheduling.router.membership import Member
from disagg.scheduling.router.restart import RestartSettings
from disagg.serve.router.auditing import AUDIT_TIMEOUT_S, Auditing
from disagg.serve.router.control_socket import ControlSocket
from disagg.serve.router.effects import NO_EFFECTS, RouterEffects
from disagg.serve.router.interface import InstanceStatus
from disagg.serve.router.kv_publisher import KvEventPublisher
from disagg.serve.router.record import LiveStream
from disagg.serve.router.shell import RouterShell
from disagg.serve.router.sink import NullSink, RouterSink
from disagg.serve.router.start_gate import StartGate
from disagg.serve.router.watcher import InstanceWatcher

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Among:
    """What a router is told that is one of several: its name, and which instances are cordoned already.

    Silent instances are found, and links measured, by the one that keeps the fleet.
    """

    name: RouterId
    cordoned: tuple[InstanceId, ...] = ()
    part: RouterPart = RouterPart.FOLLOWER


ALONE: Final = Among(RouterId(""), part=RouterPart.ALONE)
KEEPER: Final = Among(RouterId(""), part=RouterPart.KEEPER)


class LiveRouter:
    """The Router that the API uses. ``start`` binds the socket; ``close`` ends what is left.

    ``event_log`` names a file that receives every decision; ConfigurationError is raised where it cannot be written.
    ``scheduler`` is what the instances are told in common.
    ``instance_starting`` and ``instance_exited`` are for whoever runs the processes.
    """

    def __init__(  # noqa: PLR0913 (each is one thing that a router may have)
        self,
        instances: Mapping[InstanceId, Role],
        settings: RouterSettings,
        socket: ControlSocket,
        *,
        sink: RouterSink | None = None,
        clock: Clock | None = None,
        event_log: Path | None = None,
        restarts: RestartSettings | None = None,
        scheduler: SchedulerSettings | None = None,
        kv_events: KvEventPublisher | None = None,
        among: Among = ALONE,
    ) -> None:
        clock = clock or MonotonicClock()
        header = RouterHeader(
            instances=dict(instances),
            settings=settings,
            scheduler=scheduler or SchedulerSettings(),
            started_s=clock.now(),
            restarts=restarts or RestartSettings(),
            watches_silence=among.part is not RouterPart.FOLLOWER,
            measures_links=among.part is not RouterPart.FOLLOWER,
            cordoned=among.cordoned,
            part=among.part,
        )
        self.name = among.name
        """See Router."""
        self._followed: ElasticView | None = None
        self._socket = socket
        self._kv_events = kv_events
        self._core = RouterCore(header)
        self._shell = RouterShell(
            self._core,
            socket,
            clock=clock,
            sink=sink or NullSink(),
            event_log=None if event_log is None else EventLog(event_log, header),
        )
        self._start_gate = StartGate(settings.instance_wait_s, settings.max_queued_requests)
        self._stopping = False
        self._auditing = Auditing(
            lambda instance, message: socket.send(instance, encode(message)),
            first=0 if among is ALONE else secrets.randbits(60),
        )

    # For the API ----------------------------------------------------------------------------------------------

    def submit(self, request: GenerationRequest) -> LiveStream:
        """See Router."""
        if self._stopping:
            raise UnavailableError("the server is stopping")
        return self._shell.submit(request)

    async def wait_started(self) -> None:
        """See Router."""
        await self._start_gate.wait()

    def abort(self, request_id: RequestId) -> None:
        """See Router."""
        self._shell.cancel(request_id)

    def instances(self) -> tuple[InstanceStatus, ...]:
        """See Router."""
        return tuple(_status(member) for member in self._core.members)

    def is_ready(self) -> bool:
        """See Router."""
        return self._core.can_serve() and not self._stopping

    def elastic_view(self) -> ElasticView:
        """See Router."""
        return self._core.elastic_view if self._followed is None else self._followed

    def links(self) -> tuple[MeasuredLink, ...]:
        """See Router."""
        return self._core.links

    async def audit(self) -> tuple[dict[InstanceId, Audited], tuple[str, ...]]:
        """See Router."""
        alive = [member.instance for member in self._core.members if member.is_alive]
        answers = await self._auditing.ask(alive)
        silent = tuple(
            f"{instance} gave no answer for {AUDIT_TIMEOUT_S:g} s" for instance in alive if instance not in answers
        )
        try:
            self._core.validate()
        except InternalError as error:
            return answers, (*silent, f"the router's own books: {error}")
        return answers, silent

    # For an operator ------------------------------------------------------------------------------------------

    def measure_links(self) -> None:
        """Let all links be measured anew."""
        self._shell.feed(MeasureLinks())

    def command(self, command: AnyCommand) -> None:
        """Change the deployment; raise ConfigurationError, with the reason, where that cannot be done."""
        self._shell.feed(command)

    # For whoever runs the server ------------------------------------------------------------------------------

    def hear(self, news: AnyElasticNews) -> None:
        """Take what a planner says, or, where this one keeps the fleet, another router."""
        self._shell.feed(news)

    def show(self, view: ElasticView) -> None:
        """Take what the keeper of the fleet knows of how it changes by itself."""
        self._followed = view

    def start(self, watcher: InstanceWatcher, effects: RouterEffects = NO_EFFECTS) -> None:
        """Listen for instances and tell ``watcher`` about them; raise ConfigurationError when that is impossible.

        ``effects`` bring about what the router decides beyond them.
        """
        self._shell.watcher = watcher
        self._shell.effects = effects
        self._socket.open(self._receive)
        self.tick()

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new sequences and wait for those under way; return False when some had to be failed."""
        self._stopping = True
        self._start_gate.open()
        return await self.finish(timeout_s, UnavailableError("the server is stopping"))

    async def finish(self, timeout_s: float, error: DisaggError) -> bool:
        """Wait for the sequences under way; return False when some had to be failed, with ``error``."""
        try:
            await asyncio.wait_for(self._shell.wait_until_idle(), timeout_s)
        except TimeoutError:
            self._shell.cancel_all(error)
            return False
        return True

    def stop_instances(self) -> None:
        """Ask every instance to end."""
        self._stopping = True
        for member in self._core.members:
            self._shell.stop_instance(member.instance)

    def close(self) -> None:
        """Fail what is under way, and stop to listen. May be called twice."""
        self._stopping = True
        self._start_gate.open()
        self._shell.cancel_all(UnavailableError("the server has stopped"))
        self._shell.close()
        self._socket.close()

    def tick(self) -> None:
        """Let time pass: silent instances are found, deadlines end. A timer does this; public for tests of time."""
        self._shell.tick()

    # For whoever runs the instances ---------------------------------------------------------------------------

    def instance_starting(self, instance: InstanceId) -> None:
        """A process of the instance is about to be started; it is given time to load."""
        self._shell.feed(ProcessStarting(instance=instance))

    def instance_exited(self, instance: InstanceId, detail: str) -> None:
        """The instance's process is gone. The watcher is told, before this returns, whether to start it again."""
        self._shell.feed(ProcessExited(instance=instance, detail=detail))

    def follow(self, change: ProcessStarting | ProcessExited | AnyCommand) -> None:
        """Take what was decided about the deployment elsewhere. What is of no use here any more is left."""
        if not isinstance(change, Join) and not self.has_instance(change.instance):
            return
        try:
            self._shell.feed(change)
        except ConfigurationError as error:
            logger.debug("%s", error)
            if isinstance(change, Drain):
                self._shell.watcher.instance_drained(change.instance)

    def instance_joined(self, instance: InstanceId, role: Role) -> None:
        """See MemberListener."""
        self._shell.feed(Join(instance=instance, role=role))

    def instance_asks_to_leave(self, instance: InstanceId) -> None:
        """See MemberListener. It goes whatever is left to serve, so the command is forced."""
        self._shell.feed(Drain(instance=instance, leave=True, force=True))

    def instance_left(self, instance: InstanceId) -> None:
        """See MemberListener."""
        self._shell.feed(Leave(instance=instance))

    def instance_returns(self, instance: InstanceId, detail: str) -> None:
        """See MemberListener."""
        self.instance_exited(instance, detail)
        if self.has_instance(instance):
            self.instance_starting(instance)

    def has_instance(self, instance: InstanceId) -> bool:
        """See MemberListener."""
        return self._core.members.get(instance) is not None

    def started_as(self, instance: InstanceId) -> Role:
        """Return the role that the instance's process was told."""
        return self._core.members[instance].started_as

    def incarnation_of(self, instance: InstanceId) -> str:
        """Return the name of an instance's current or last life; empty before its first."""
        return self._core.members[instance].incarnation

    def takes_requests(self, instance: InstanceId) -> bool:
        """See MemberListener."""
        return self._core.members[instance].state is InstanceState.READY

    # Messages -------------------------------------------------------------------------------------------------

    def _receive(self, instance: InstanceId, data: bytes) -> None:
        if self._core.members.get(instance) is None:
            logger.warning("a message from %r, which is no instance of this server, was dropped", instance)
            return
        try:
            message = decode_for_router(data)
        except ProtocolError as error:
            logger.warning("a message from %s was dropped: %s", instance, error)
            self._shell.feed(MalformedMessage(instance=instance, error=str(error)))
            return
        if isinstance(message, StepOutput):
            self._shell.emit(instance, message.outputs)
            return
        if isinstance(message, Audited):
            self._auditing.take(instance, message)
            return
        self._shell.feed(InstanceSaid(instance=instance, message=message))
        if isinstance(message, KvEvents) and self._kv_events is not None:
            self._kv_events.publish(message)
        elif isinstance(message, Loading):
            self._shell.watcher.instance_loading(instance, message.stage, message.fraction)
        elif isinstance(message, Ready) and self._core.can_serve():
            self._start_gate.open()


def _status(member: Member) -> InstanceStatus:
    return InstanceStatus(
        instance=member.instance,
        role=member.role,
        state=member.state,
        facts=member.facts,
        load=member.load,
        num_restarts=member.num_restarts,
        num_sequences=member.entry.num_held,
        is_leaving=member.is_leaving,
        detail=member.detail,
    )
