"""One server from start to end: socket, instances, router, API.

The order matters: what can be wrong is found before anything is started, and what was started is ended in reverse,
whatever happens in between.
"""

import asyncio
import logging
import os
import secrets
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from starlette.types import ASGIApp

from disagg.base.errors import InternalError
from disagg.serve.launch.api_server import CLOSE_S, ApiServer, make_api_server
from disagg.serve.launch.cluster_manager import ManagerFactory
from disagg.serve.launch.deployment import Deployment, plan_instances
from disagg.serve.launch.descriptors import share_descriptors
from disagg.serve.launch.launcher import Launcher
from disagg.serve.launch.listening import private_endpoint, url_of
from disagg.serve.launch.operator import LocalOperator
from disagg.serve.launch.outside_door import control_socket, kv_host_of, open_door, watcher_of
from disagg.serve.launch.process import ENGINE_COMMAND
from disagg.serve.launch.runners import InstanceRunners
from disagg.serve.launch.server_observer import ServerObserver
from disagg.serve.launch.shared_files import core_board, shared_weights
from disagg.serve.launch.signals import SignalQueue
from disagg.serve.router.control_socket import ZmqControlSocket
from disagg.serve.router.doorkeeper import SharedKey
from disagg.serve.router.effects import RouterEffects
from disagg.serve.router.kv_publisher import open_publisher
from disagg.serve.router.live import LiveRouter
from disagg.serve.router.planner_process import PlannerProcess
from disagg.serve.router.sink import RouterSink

logger = logging.getLogger(__name__)

AppFactory = Callable[[LiveRouter, LocalOperator], ASGIApp]
"""Makes the HTTP application of a router and of whoever changes its deployment."""


class LiveServer:
    """A server whose socket listens already. ``run`` it once."""

    def __init__(
        self,
        deployment: Deployment,
        bound: socket.socket,
        make_app: AppFactory,
        observer: ServerObserver,
        *,
        model_name: str,
        sink: RouterSink | None = None,
        engine_command: Sequence[str] = ENGINE_COMMAND,
        make_manager: ManagerFactory | None = None,
    ) -> None:
        self._deployment = deployment
        self._bound = bound
        self._make_app = make_app
        self._observer = observer
        self._model_name = model_name
        self._sink = sink
        self._engine_command = engine_command
        self._make_manager = make_manager

    async def run(self) -> None:
        """Serve until SIGINT, SIGTERM or SIGHUP; drain on the first, stop at once on the second.

        Raises a DisaggError when an instance does not start, or when too many died for good.
        """
        with ExitStack() as resources:
            self._signals = resources.enter_context(SignalQueue())
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
            folder = self._deployment.host.event_log
            self._router = LiveRouter(
                self._deployment.roles(),
                self._deployment.router,
                control_socket(ZmqControlSocket(endpoint, SharedKey(control_key)), outside),
                sink=self._sink,
                scheduler=self._deployment.scheduler,
                event_log=None if folder is None else Path(folder) / "router.jsonl",
                kv_events=open_publisher(self._deployment.host.kv_events, self._model_name, resources),
            )
            resources.callback(self._router.close)
            launcher = Launcher(instances, self._router, self._observer, command=self._engine_command)
            manager = None if self._make_manager is None else self._make_manager()
            self._runners = InstanceRunners(launcher, manager, outside)
            self._operator = LocalOperator(self._deployment, instances, self._router, launcher, manager)
            self._planner = PlannerProcess(self._router.hear)
            self._router.start(
                watcher_of(launcher, self._router, outside),
                RouterEffects(add_instance=self._operator.add_wanted, ask_planner=self._planner.ask),
            )
            await self._serve()

    async def _serve(self) -> None:
        """Run instances and API together, and end both."""
        budget = share_descriptors(len(self._deployment.roles()))
        api = make_api_server(self._make_app(self._router, self._operator), self._deployment.serve, budget)
        self._runners.start()
        api_task = asyncio.create_task(api.serve(sockets=[self._bound]), name="api")
        announcement = asyncio.create_task(self._announce(), name="announcement")
        try:
            await self._wait_for_end(api_task)
        finally:
            announcement.cancel()
            api.should_exit = True
            await self._end(api, api_task)

    async def _announce(self) -> None:
        await self._runners.wait_ready()
        self._observer.server_ready(url_of(self._bound), self._model_name, self._router.instances())

    async def _wait_for_end(self, api_task: asyncio.Task[None]) -> None:
        """Return on a signal; raise when the server cannot go on."""
        name = await self._runners.until_signal(self._signals, api_task)
        if name is None:
            raise InternalError("the API ended by itself; the log says why") from api_task.exception()
        self._observer.server_stopping(name, self._deployment.serve.drain_s)

    async def _end(self, api: ApiServer, api_task: asyncio.Task[None]) -> None:
        """Drain, then stop the instances and the API; a second signal cuts every wait short."""

        def kill() -> None:
            self._runners.kill()
            api.force_exit = True

        try:
            await self._signals.cut_short(self._end_patiently(api_task), kill)
        finally:
            self._router.close()
            await self._planner.close()
            await self._runners.stop()
            api.force_exit = True
            await asyncio.wait({api_task}, timeout=CLOSE_S)

    async def _end_patiently(self, api_task: asyncio.Task[None]) -> None:
        await self._router.drain(0.0 if self._runners.has_failed else self._deployment.serve.drain_s)
        await asyncio.wait({api_task}, timeout=CLOSE_S)
        self._router.stop_instances()
        await self._runners.stop()
