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

from disagg.base.errors import ConfigurationError
from disagg.base.ids import RouterId
from disagg.serve.api.fleet_metrics import FleetMetrics
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
from disagg.serve.launch.runners import InstanceRunners
from disagg.serve.launch.server_observer import ServerObserver
from disagg.serve.launch.shared_files import core_board, shared_weights
from disagg.serve.launch.signals import SignalQueue
from disagg.serve.router.control_socket import ControlSocket, ZmqControlSocket
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
            outside = open_door(self._deployment)
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
            metrics = FleetMetrics(self._model_name)
            control = control_socket(ZmqControlSocket(endpoint, SharedKey(control_key)), outside)
            self._router = self._open_router(control, metrics, resources)
            keeper = FleetKeeper(self._router, control)
            launcher = Launcher(instances, keeper, self._observer, command=self._engine_command)
            keeper.runner = watcher_of(launcher, FleetGuests(keeper, self._router), outside)
            manager = None if self._make_manager is None else self._make_manager()
            self._routers = RouterProcesses(
                self._deployment,
                self._bound,
                keeper,
                self._task(endpoint, control_key),
                self._observer,
                metrics.exposition,
            )
            self._runners = InstanceRunners(launcher, manager, outside, beside=(self._routers,))
            operator = LocalOperator(
                self._deployment, instances, keeper, launcher, manager, restart=self._routers.restart
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

    def _open_router(self, control: ControlSocket, metrics: FleetMetrics, resources: ExitStack) -> LiveRouter:
        folder = self._deployment.host.event_log
        router = LiveRouter(
            self._deployment.roles(),
            self._deployment.router,
            control,
            sink=metrics,
            scheduler=self._deployment.scheduler,
            event_log=None if folder is None else Path(folder) / "router.jsonl",
            kv_events=open_publisher(self._deployment.host.kv_events, self._model_name, resources),
            among=KEEPER,
        )
        resources.callback(router.close)
        return router

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
        self._runners.start()
        self._routers.start()
        announcement = asyncio.create_task(self._announce(), name="announcement")
        try:
            await self._wait_for_end()
        finally:
            announcement.cancel()
            await self._end()

    async def _announce(self) -> None:
        await self._runners.wait_ready()
        await self._routers.wait_serving()
        self._observer.server_ready(url_of(self._bound), self._model_name, self._router.instances())

    def _restart(self) -> None:
        try:
            logger.info("SIGHUP: %s", self._routers.restart())
        except ConfigurationError as error:
            logger.warning("SIGHUP: %s", error)

    async def _wait_for_end(self) -> None:
        """Return on a signal; raise when the server cannot go on."""
        name = await self._runners.until_signal(self._signals)
        assert name is not None, "nothing else is waited for"
        self._observer.server_stopping(name, self._deployment.serve.drain_s)

    async def _end(self) -> None:
        """Drain, then stop routers and instances; a second signal cuts every wait short."""
        try:
            await self._signals.cut_short(self._end_patiently(), self._kill)
        finally:
            await self._routers.stop(0.0)
            self._router.close()
            await self._planner.close()
            await self._runners.stop()

    def _kill(self) -> None:
        self._runners.kill()
        self._routers.kill()

    async def _end_patiently(self) -> None:
        await self._routers.stop(0.0 if self._runners.has_failed else self._deployment.serve.drain_s)
        self._router.stop_instances()
        await self._runners.stop()
