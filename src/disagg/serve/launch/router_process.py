"""``python -m disagg.serve.launch.router_process``: one of several routers before one fleet, with an API of its own.

The first line of standard input says what it is (``RouterTask``). The instances are its parent's: it is told of them,
they connect to it, and it routes its own clients' requests. Exit status 0 when it was retired, 2 with one line
``error: ...`` for settings that cannot be used, 1 for anything else.
"""

import asyncio
import logging
import signal
import socket
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final

import msgspec
import uvloop

from disagg.base.errors import ConfigurationError, ProtocolError, ServerRestartingError, UnavailableError
from disagg.base.ids import InstanceId
from disagg.base.message_fields import PROTOCOL_VERSION
from disagg.base.messages import InstanceFacts
from disagg.base.parent import end_with_parent
from disagg.scheduling.dispatch.events import ChangeRole, Join, Leave
from disagg.scheduling.dispatch.tenant_shares import TenantShare
from disagg.scheduling.dispatch.workload_report import WorkloadReport
from disagg.scheduling.router.inputs import TenantsReported
from disagg.serve.launch.api_parts import ApiParts, open_api
from disagg.serve.launch.api_server import CLOSE_S, make_api_server
from disagg.serve.launch.descriptors import share_descriptors
from disagg.serve.launch.fleet_messages import (
    FLEET_VERSION,
    AllMetrics,
    CommandAnswered,
    FleetChanged,
    FleetChanges,
    GiveMetrics,
    InstanceDrained,
    InstanceFaulty,
    MetricsGiven,
    Retire,
    Roster,
    RouterListening,
    RouterServing,
    RouterTask,
    RouterUp,
    SignOfLife,
    TenantsElsewhere,
    TenantsTold,
    ToRouterProcess,
    WorkloadTold,
    decode_for_router_process,
)
from disagg.serve.launch.join import key_folder
from disagg.serve.launch.key_files import server_guard
from disagg.serve.launch.launcher import CONFIGURATION_STATUS
from disagg.serve.launch.message_pipe import MessagePipe
from disagg.serve.launch.outside_door import control_socket
from disagg.serve.launch.remote_operator import RemoteOperator
from disagg.serve.router.control_socket import ZmqControlSocket
from disagg.serve.router.doorkeeper import SharedKey
from disagg.serve.router.effects import RouterEffects
from disagg.serve.router.live import Among, LiveRouter
from disagg.serve.router.outside import KnownGuests
from disagg.serve.router.watcher import NullWatcher

FAILURE_STATUS: Final = 1
ROSTER_S: Final = 30.0
"""How long the list of instances may take to come."""
LIFE_S: Final = 1.0
"""Between two signs of life."""

logger = logging.getLogger(__name__)


class FollowingWatcher(NullWatcher):
    """Tells the keeper of the fleet what one of its routers finds out about an instance."""

    def __init__(self, router: LiveRouter, pipe: MessagePipe) -> None:
        self._router = router
        self._pipe = pipe
        self.some_ready = asyncio.Event()
        """Set once requests can be served."""

    def instance_ready(self, instance: InstanceId, facts: InstanceFacts) -> None:
        """See InstanceWatcher."""
        if self._router.is_ready():
            self.some_ready.set()

    def instance_faulty(self, instance: InstanceId, why: str) -> None:
        """See InstanceWatcher."""
        incarnation = self._router.incarnation_of(instance)
        self._pipe.send(InstanceFaulty(instance=instance, incarnation=incarnation, why=why))

    def instance_drained(self, instance: InstanceId) -> None:
        """See InstanceWatcher."""
        self._pipe.send(InstanceDrained(instance=instance))


class RouterProcess:
    """One router from its list of instances to its retirement. ``run`` it once."""

    def __init__(self, task: RouterTask, parts: ApiParts) -> None:
        self._task = task
        self._parts = parts

    async def run(self) -> None:
        """Serve until retired, or until the keeper of the fleet is gone."""
        with ExitStack() as resources:
            self._pipe = await MessagePipe.open(socket.socket(fileno=self._task.pipe))
            resources.callback(self._pipe.close)
            await self._run(resources)

    async def _run(self, resources: ExitStack) -> None:
        self._pipe.send(RouterUp(protocol=PROTOCOL_VERSION, fleet=FLEET_VERSION))
        roster = await asyncio.wait_for(self._next(), ROSTER_S)
        if not isinstance(roster, Roster):
            return  # the server ends before it has begun
        self._guests = self._make_door(roster)
        self._router = self._make_router(roster)
        resources.callback(self._router.close)
        self._operator = RemoteOperator(self._pipe)
        watcher = FollowingWatcher(self._router, self._pipe)
        self._router.start(
            watcher, RouterEffects(report_workload=self._report_workload, report_tenants=self._report_tenants)
        )
        self._pipe.send(RouterListening(outside_port=0 if self._guests is None else self._guests.port))
        deployment = self._task.deployment
        app = self._parts.make_app(self._router, self._operator, self._operator.all_metrics)
        self._api = make_api_server(app, deployment.serve, share_descriptors(len(roster.instances)))
        serving = asyncio.create_task(self._serve(roster, watcher), name="api")
        living = asyncio.create_task(self._show_life(), name="signs of life")
        try:
            await self._obey(serving)
        finally:
            living.cancel()
            self._api.force_exit = self._api.should_exit = True
            await asyncio.wait({serving}, timeout=CLOSE_S)

    def _report_workload(self, report: WorkloadReport) -> None:
        self._report(WorkloadTold(report=report))

    def _report_tenants(self, shares: tuple[TenantShare, ...]) -> None:
        self._report(TenantsTold(shares=shares))

    def _report(self, report: WorkloadTold | TenantsTold) -> None:
        with suppress(UnavailableError):  # the keeper is gone: that is noticed where it is listened to
            self._pipe.send(report)

    def _make_door(self, roster: Roster) -> KnownGuests | None:
        task = self._task
        if not task.outside_endpoint:
            return None
        socket = ZmqControlSocket(task.outside_endpoint, server_guard(key_folder(task.deployment.remote)))
        return KnownGuests(socket, [entry.instance for entry in roster.instances if entry.is_outside])

    def _make_router(self, roster: Roster) -> LiveRouter:
        task, deployment = self._task, self._task.deployment
        inside = ZmqControlSocket(task.endpoint, SharedKey(task.control_key))
        folder = deployment.host.event_log
        router = LiveRouter(
            {entry.instance: entry.started_as for entry in roster.instances},
            deployment.router,
            control_socket(inside, self._guests),
            sink=self._parts.metrics,
            scheduler=deployment.scheduler,
            event_log=None if folder is None else Path(folder) / f"router-{task.name}.jsonl",
            among=Among(task.name, tuple(entry.instance for entry in roster.instances if entry.is_cordoned)),
        )
        for entry in roster.instances:
            if entry.role is not entry.started_as:
                router.command(ChangeRole(instance=entry.instance, role=entry.role, force=True))
        return router

    async def _serve(self, roster: Roster, watcher: FollowingWatcher) -> None:
        """Accept clients: at once at the start of the server, else when the instances have come."""
        if any(entry.is_ready for entry in roster.instances):
            await watcher.some_ready.wait()
        serving = asyncio.create_task(self._api.serve(sockets=[socket.socket(fileno=self._task.listener)]))
        try:
            await self._api.has_begun.wait()
            self._pipe.send(RouterServing())
            await serving
        finally:
            serving.cancel()

    async def _obey(self, serving: "asyncio.Task[None]") -> None:
        while (message := await self._next()) is not None:
            match message:
                case FleetChanged():
                    self._follow(message)
                case CommandAnswered() | AllMetrics():
                    self._operator.hear(message)
                case GiveMetrics(number=number):
                    metrics = self._parts.metrics
                    self._pipe.send(
                        MetricsGiven(number=number, text=metrics.of_router(), of_instances=metrics.of_instances())
                    )
                case FleetChanges(view=view):
                    self._router.show(view)
                case TenantsElsewhere(router=name, shares=shares):
                    self._router.hear(TenantsReported(router=name, shares=shares))
                case Retire():
                    await self._retire(message, serving)
                    return
                case Roster():
                    raise ProtocolError("the list of instances came twice")

    def _follow(self, changed: FleetChanged) -> None:
        change, guests = changed.change, self._guests
        if guests is not None and changed.is_outside and isinstance(change, Join):
            guests.add(change.instance)
        self._router.follow(change)
        if guests is not None and isinstance(change, Leave):
            guests.discard(change.instance)

    async def _retire(self, order: Retire, serving: "asyncio.Task[None]") -> None:
        """Finish what is under way while instances still come and go."""
        obeying = asyncio.create_task(self._obey(serving), name="orders while retiring")
        self._api.retire(order.timeout_s)
        try:
            if order.is_restart:
                await asyncio.wait({serving, obeying}, timeout=order.timeout_s, return_when=asyncio.FIRST_COMPLETED)
                await self._router.finish(0.0, _restarting(order.timeout_s))
            else:
                draining = asyncio.create_task(self._router.drain(order.timeout_s), name="drain")
                await asyncio.wait({draining, obeying}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({serving}, timeout=CLOSE_S)
        finally:
            obeying.cancel()

    async def _show_life(self) -> None:
        while True:
            self._pipe.send(SignOfLife())
            await asyncio.sleep(LIFE_S)

    async def _next(self) -> ToRouterProcess | None:
        data = await self._pipe.receive()
        return None if data is None else decode_for_router_process(data)


def _restarting(timeout_s: float) -> ServerRestartingError:
    return ServerRestartingError(
        f"the server starts its routers anew, and the request did not end within {timeout_s:g} s "
        "(--restart-timeout-s): send it again"
    )


def main() -> int:
    """Run the router; return the exit status."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are for the keeper of the fleet
    try:
        task = msgspec.json.decode(sys.stdin.buffer.read(), type=RouterTask)
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
        logging.getLogger("disagg").setLevel(task.log_level)
        if end_with_parent(task.parent_pid):
            _run(task)
    except (ConfigurationError, msgspec.MsgspecError) as error:
        sys.stderr.write(f"error: {error}\n")
        return CONFIGURATION_STATUS
    return 0


def _run(task: RouterTask) -> None:
    with ExitStack() as resources:
        parts = open_api(task.deployment, resources)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(RouterProcess(task, parts).run())


if __name__ == "__main__":
    sys.exit(main())
