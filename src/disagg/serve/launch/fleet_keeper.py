"""Keeps one fleet for several routers: a router of no sequences decides what becomes of instances, the others follow.

The keeper's own core is fed by the instances as any router's is. What it decides of the deployment (who is started
again, drained, removed, flipped, added) is told to the routers, and to each instance which routers there are.
"""

import asyncio
import logging

from disagg.base.errors import ConfigurationError, UnavailableError
from disagg.base.ids import InstanceId, RouterId
from disagg.base.message_fields import Message
from disagg.base.messages import InstanceFacts, encode
from disagg.base.router_messages import SAME_HOST, JoinRouter, LeaveRouter
from disagg.scheduling.dispatch.events import ChangeRole, Drain, Join, Leave, ProcessStarting, Undrain
from disagg.scheduling.dispatch.state import ALIVE, InstanceState
from disagg.scheduling.dispatch.tenant_shares import TenantShare
from disagg.scheduling.dispatch.workload_report import WorkloadReport
from disagg.scheduling.router.inputs import AnyCommand, ProcessExited, WorkloadReported
from disagg.serve.launch.fleet_messages import (
    FleetChanged,
    FleetChanges,
    InstanceFaulty,
    Roster,
    RosterEntry,
    TenantsElsewhere,
)
from disagg.serve.launch.router_child import RouterChild
from disagg.serve.router.control_socket import ControlSocket
from disagg.serve.router.interface import InstanceStatus
from disagg.serve.router.live import LiveRouter
from disagg.serve.router.watcher import InstanceWatcher

logger = logging.getLogger(__name__)


class FleetKeeper:
    """See the module. It is the launcher's ProcessListener, the operator's CommandTaker, and an InstanceWatcher.

    ``router`` is its own, which uses ``socket`` to speak with instances. ``runner`` is told what becomes of them.
    """

    def __init__(self, router: LiveRouter, socket: ControlSocket) -> None:
        self._router = router
        self._socket = socket
        self._routers: dict[RouterId, tuple[RouterChild, str]] = {}
        """Those that know the instances, each with where it listens."""
        self._drained: dict[InstanceId, set[RouterId]] = {}
        """Draining instances, with the routers that have nothing on them any more."""
        self._leaving: set[InstanceId] = set()
        """Those of them that are removed once no router has."""
        self._guests: set[InstanceId] = set()
        """Instances of other hosts."""
        self.runner: InstanceWatcher | None = None

    # Routers --------------------------------------------------------------------------------------------------

    def roster(self) -> Roster:
        """Return the instances as they are now."""
        return Roster(
            instances=tuple(
                RosterEntry(
                    instance=one.instance,
                    started_as=self._router.started_as(one.instance),
                    role=one.role,
                    is_cordoned=one.instance in self._drained,
                    is_ready=one.state is InstanceState.READY,
                    is_outside=one.instance in self._guests,
                )
                for one in self._router.instances()
            )
        )

    def router_up(self, child: RouterChild, endpoint: str) -> None:
        """A router wants to know the instances; from now on it is told what becomes of them."""
        child.tell(self.roster())
        self._routers[child.name] = (child, endpoint)
        for drained in self._drained.values():
            drained.add(child.name)  # it is given nothing there

    def router_listening(self, child: RouterChild, outside_port: int) -> None:
        """Instances can connect to a router, those of other hosts at ``outside_port``."""
        child.is_up, child.outside_port = True, outside_port
        for status in self._router.instances():
            if status.state in ALIVE:
                self._introduce(status.instance, child.name)

    def router_gone(self, child: RouterChild) -> None:
        """A router's process is gone, and its sequences with it."""
        if self._routers.pop(child.name, None) is None:
            return
        for status in self._router.instances():
            if status.state in ALIVE:
                self._tell_instance(status.instance, LeaveRouter(router=child.name))
        self._remove_drained()
        self.router_tells_tenants(child, ())

    def router_says_faulty(self, said: InstanceFaulty) -> None:
        """End the process of an instance that a router cannot use, unless it is another life by now."""
        if self.has_instance(said.instance) and self._router.incarnation_of(said.instance) == said.incarnation:
            logger.error("a router treats %s as dead: %s", said.instance, said.why)
            self._runner.instance_faulty(said.instance, said.why)

    def router_has_drained(self, child: RouterChild, instance: InstanceId) -> None:
        """A router has nothing on a draining instance any more."""
        if (drained := self._drained.get(instance)) is not None:
            drained.add(child.name)
            self._remove_drained()

    def router_tells_workload(self, child: RouterChild, report: WorkloadReport) -> None:
        """Take what has come to a router: how the fleet changes is decided by that."""
        self._router.hear(WorkloadReported(router=child.name, report=report))

    def router_tells_tenants(self, child: RouterChild, shares: tuple[TenantShare, ...]) -> None:
        """Pass on to the other routers what one has of those who share the server."""
        for other, _ in list(self._routers.values()):
            if other is not child:
                other.tell(TenantsElsewhere(router=child.name, shares=shares))

    def show_changes(self, child: RouterChild) -> None:
        """Tell a router how the fleet changes by itself, where it does not know yet."""
        if (view := self._router.elastic_view()) != child.shown:
            child.shown = view
            child.tell(FleetChanges(view=view))

    def _introduce(self, instance: InstanceId, router: RouterId) -> None:
        child, endpoint = self._routers[router]
        if instance in self._guests:
            endpoint = f"{SAME_HOST}{child.outside_port}"
        self._tell_instance(instance, JoinRouter(router=router, endpoint=endpoint))

    def _tell_instance(self, instance: InstanceId, message: Message) -> None:
        try:
            self._socket.send(instance, encode(message))
        except UnavailableError as error:
            logger.debug("%s is not told of routers: %s", instance, error)  # its end is noticed elsewhere

    def _tell_routers(self, change: ProcessStarting | ProcessExited | AnyCommand) -> None:
        told = FleetChanged(change=change, is_outside=change.instance in self._guests)
        for child, _ in list(self._routers.values()):
            child.tell(told)

    def guest_joins(self, join: Join) -> None:
        """Let an instance of another host belong to the fleet; raise ConfigurationError when it cannot."""
        self._router.command(join)
        self._guests.add(join.instance)
        self._tell_routers(join)

    # Commands -------------------------------------------------------------------------------------------------

    def command(self, command: AnyCommand) -> None:
        """See CommandTaker."""
        match command:
            case Drain(instance=instance):
                self._drain(instance, leave=command.leave, force=command.force)
            case Undrain(instance=instance) if instance in self._leaving:
                raise ConfigurationError(f"{instance} cannot be given sequences again: it is being removed")
            case Undrain(instance=instance):
                self._router.command(command)
                self._drained.pop(instance, None)
                self._tell_routers(command)
            case ChangeRole(instance=instance, role=role):
                self._router.command(command)
                self._tell_routers(ChangeRole(instance=instance, role=role, force=True))
            case _:
                self._router.command(command)
                self._tell_routers(command)

    def change_wanted(self, command: Drain | ChangeRole) -> None:
        """Carry out what was decided here, once the present event is done with."""
        asyncio.get_running_loop().call_soon(self._change, command)

    def _change(self, command: Drain | ChangeRole) -> None:
        try:
            self.command(command)
        except ConfigurationError as error:
            logger.debug("%s", error)  # it is decided anew another time

    def measure_links(self) -> None:
        """See CommandTaker."""
        self._router.measure_links()

    def has_instance(self, instance: InstanceId) -> bool:
        """See CommandTaker."""
        return self._router.has_instance(instance)

    def _drain(self, instance: InstanceId, *, leave: bool, force: bool) -> None:
        """Let all routers drain an instance; one that is to leave is ended when no router has anything on it."""
        status = self._status(instance)
        if instance in self._leaving:
            raise ConfigurationError(f"{instance} is being removed already")
        if leave and (status is None or status.state not in ALIVE):
            self._router.command(Drain(instance=instance, leave=True, force=force))
            return
        if instance not in self._drained or not leave:
            self._router.command(Drain(instance=instance, force=force))
            self._drained[instance] = set()
            self._tell_routers(Drain(instance=instance, force=True))
        if leave:
            self._leaving.add(instance)
            self._remove_drained()

    def _remove_drained(self) -> None:
        """End the instances that are to leave, and that no router has anything on."""
        for instance in [one for one in self._leaving if self._drained.get(one, set()) >= self._routers.keys()]:
            self._leaving.remove(instance)
            self._router.command(Drain(instance=instance, leave=True, force=True))

    def _status(self, instance: InstanceId) -> InstanceStatus | None:
        return next((one for one in self._router.instances() if one.instance == instance), None)

    # ProcessListener ------------------------------------------------------------------------------------------

    def instance_starting(self, instance: InstanceId) -> None:
        """See ProcessListener."""
        self._router.instance_starting(instance)
        self._tell_routers(ProcessStarting(instance=instance))

    def instance_exited(self, instance: InstanceId, detail: str) -> None:
        """See ProcessListener."""
        self._router.instance_exited(instance, detail)
        status = self._status(instance)
        if status is None:
            return  # it was to leave
        returns = status.state is InstanceState.LOST
        self._tell_routers(ProcessExited(instance=instance, detail=detail, returns=returns))
        if instance in self._leaving:
            self._leaving.remove(instance)
            self._router.command(Drain(instance=instance, leave=True, force=True))

    # InstanceWatcher ------------------------------------------------------------------------------------------

    def instance_loading(self, instance: InstanceId, stage: str, fraction: float) -> None:
        """See InstanceWatcher."""
        self._runner.instance_loading(instance, stage, fraction)

    def instance_ready(self, instance: InstanceId, facts: InstanceFacts) -> None:
        """See InstanceWatcher."""
        self._runner.instance_ready(instance, facts)
        for child, _ in list(self._routers.values()):
            if child.is_up:
                self._introduce(instance, child.name)

    def instance_faulty(self, instance: InstanceId, why: str) -> None:
        """See InstanceWatcher."""
        self._runner.instance_faulty(instance, why)

    def restart_instance(self, instance: InstanceId, delay_s: float) -> None:
        """See InstanceWatcher."""
        self._runner.restart_instance(instance, delay_s)

    def give_up_instance(self, instance: InstanceId, nothing_left: bool) -> None:
        """See InstanceWatcher."""
        self._runner.give_up_instance(instance, nothing_left)

    def instance_drained(self, instance: InstanceId) -> None:
        """See InstanceWatcher: the keeper itself has never anything on it."""

    def instance_leaving(self, instance: InstanceId) -> None:
        """See InstanceWatcher."""
        self._runner.instance_leaving(instance)

    def instance_left(self, instance: InstanceId) -> None:
        """See InstanceWatcher."""
        self._runner.instance_left(instance)
        self._drained.pop(instance, None)
        self._leaving.discard(instance)
        self._tell_routers(Leave(instance=instance))
        self._guests.discard(instance)

    @property
    def _runner(self) -> InstanceWatcher:
        assert self.runner is not None, "instances run"
        return self.runner
