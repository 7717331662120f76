"""A server of several routers: this process keeps the instances, and others serve the API before the same fleet.

It owns what outlives a router: the instances' processes, their weights, the keys, the listening socket, the signals. A
router that dies is started again, and has taken its own streams with it; SIGHUP starts all of them anew, one after the
other, while the instances and their KV caches live on.
"""

import asyncio
import logging
import os
import secrets
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from disagg.base.errors import ConfigurationError, DisaggError
from disagg.base.ids import RouterId
from disagg.serve.launch.cluster_manager import ManagerFactory
from disagg.serve.launch.deployment import Deployment, plan_instances
from disagg.serve.launch.fleet_guests import FleetGuests
from disagg.serve.launch.fleet_keeper import FleetKeeper
from disagg.serve.launch.fleet_messages import RouterTask
from disagg.serve.launch.launcher import Launcher
from disagg.serve.launch.listening import private_endpoint, url_of
from disagg.serve.launch.operator import LocalOperator
from disagg.serve.launch.outside_door import control_socket, kv_host_of, open_door, watcher_of
from disagg.serve.launch.process import ENGINE_COMMAND
from disagg.serve.launch.router_processes import RouterProcesses
from disagg.serve.launch.server_observer import ServerObserver
from disagg.serve.launch.shared_files import core_board, shared_weights
from disagg.serve.launch.signals import SignalQueue
from disagg.serve.router.control_socket import ZmqControlSocket
from disagg.serve.router.doorkeeper import SharedKey
from disagg.serve.router.effects import RouterEffects
from disagg.serve.router.kv_publisher import open_publisher
from disagg.serve.router.live import KEEPER, LiveRouter
from disagg.serve.router.planner_process import PlannerProcess

logger = logging.getLogger(__name__)


class SupervisedServer:
    """A server of several routers whose socket listens already. ``run`` it once."""

    def __init__(
        self,
        deployment: Deployment,
        bound: socket.socket,
        observer: ServerObserver,
        *,
        model_name: str,
        engine_command: Sequence[str] = ENGINE_COMMAND,
        make_manager: ManagerFactory | None = None,
    ) -> None:
        self._deployment = deployment
        self._bound = bound
        self._observer = observer
        self._model_name = model_name
        self._engine_command = engine_command
        self._make_manager = make_manager

    async def run(self) -> None:
        """Serve until SIGINT or SIGTERM; drain on the first, stop at once on the second. SIGHUP restarts the routers.

        Raises a DisaggError when an instance or a router does not start, or when too many died for good.
        """
        with ExitStack() as resources:
            self._signals = resources.enter_context(SignalQueue(on_hangup=self._restart))
            endpoint = resources.enter_context(private_endpoint())
            control_key = secrets.token_hex()
            self._outside = open_door(self._deployment)
            instances = plan_instances(
                self._deployment,
                control_endpoint=endpoint,
                available_cores=sorted(os.sched_getaffinity(0)),
                parent_pid=os.getpid(),
                control_key=control_key,
                weights=resources.enter_context(shared_weights()),
                core_board=resources.enter_context(core_board()),
                kv_host=kv_host_of(self._deployment),
            )
            folder = self._deployment.host.event_log
            control = control_socket(ZmqControlSocket(endpoint, SharedKey(control_key)), self._outside)
            self._router = LiveRouter(
                self._deployment.roles(),
                self._deployment.router,
                control,
                scheduler=self._deployment.scheduler,
                event_log=None if folder is None else Path(folder) / "router.jsonl",
                kv_events=open_publisher(self._deployment.host.kv_events, self._model_name, resources),
                among=KEEPER,
            )
            resources.callback(self._router.close)
            keeper = FleetKeeper(self._router, control)
            self._launcher = Launcher(instances, keeper, self._observer, command=self._engine_command)
            keeper.runner = watcher_of(self._launcher, FleetGuests(keeper, self._router), self._outside)
            self._manager = None if self._make_manager is None else self._make_manager()
            self._routers = RouterProcesses(
                self._deployment, self._bound, keeper, self._task(endpoint, control_key), self._observer
            )
            operator = LocalOperator(
                self._deployment, instances, keeper, self._launcher, self._manager, restart=self._routers.restart
            )
            self._routers.operator = operator
            self._planner = PlannerProcess(self._router.hear)
            self._router.start(
                keeper,
                RouterEffects(
                    add_instance=operator.add_wanted,
                    ask_planner=self._planner.ask,
                    change_fleet=keeper.change_wanted,
                ),
            )
            await self._serve()

    def _task(self, endpoint: str, control_key: str) -> RouterTask:
        return RouterTask(
            deployment=self._deployment,
            name=RouterId(""),
            endpoint=endpoint,
            control_key=control_key,
            listener=-1,
            pipe=-1,
            parent_pid=os.getpid(),
            log_level=logging.getLogger("disagg").getEffectiveLevel(),
        )

    async def _serve(self) -> None:
        self._launcher.start()
        self._routers.start()
        if self._manager is not None:
            assert self._outside is not None, "a manager's instances join"
            self._manager.start(self._outside.address, self._outside)
        announcement = asyncio.create_task(self._announce(), name="announcement")
        try:
            await self._wait_for_end()
        finally:
            announcement.cancel()
            await self._end()

    async def _announce(self) -> None:
        await self._launcher.wait_ready()
        await self._routers.wait_serving()
        self._observer.server_ready(url_of(self._bound), self._model_name, self._router.instances())

    def _restart(self) -> None:
        try:
            logger.info("SIGHUP: %s", self._routers.restart())
        except ConfigurationError as error:
            logger.warning("SIGHUP: %s", error)

    async def _wait_for_end(self) -> None:
        """Return on a signal; raise when the server cannot go on."""
        stopped = asyncio.create_task(self._signals.next(), name="signal")
        failures = self._failures()
        try:
            ends: set[asyncio.Future[Any]] = {stopped, *failures}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
        for failure in failures:
            if failure.done():
                raise failure.result()
        self._observer.server_stopping(stopped.result().name, self._deployment.serve.drain_s)

    def _failures(self) -> list["asyncio.Future[DisaggError]"]:
        runners = (self._launcher, self._routers, self._manager)
        return [runner.failed for runner in runners if runner is not None]

    async def _stop_instances(self) -> None:
        await self._launcher.stop()
        if self._manager is not None:
            await self._manager.stop()

    async def _end(self) -> None:
        """Drain, then stop routers and instances; a second signal cuts every wait short."""
        try:
            await self._signals.cut_short(self._end_patiently(), self._kill)
        finally:
            await self._routers.stop(0.0)
            self._router.close()
            await self._planner.close()
            await self._stop_instances()

    def _kill(self) -> None:
        self._launcher.kill()
        self._routers.kill()

    async def _end_patiently(self) -> None:
        failed = any(failure.done() for failure in self._failures())
        await self._routers.stop(0.0 if failed else self._deployment.serve.drain_s)
        self._router.stop_instances()
        await self._stop_instances()
