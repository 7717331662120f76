"""The processes of a server's routers: started, watched, started anew, ended; and what they ask of the fleet."""

import asyncio
import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from msgspec import structs

from disagg.base.errors import ConfigurationError, DisaggError, InternalError, UnavailableError
from disagg.base.ids import InstanceId, RouterId
from disagg.scheduling.dispatch.events import ChangeRole, Drain, Undrain
from disagg.scheduling.router.inputs import MeasureLinks
from disagg.scheduling.router.outputs import AddInstance
from disagg.scheduling.router.restart import RestartPolicy, RestartSettings
from disagg.serve.launch.deployment import Deployment
from disagg.serve.launch.fleet_keeper import FleetKeeper
from disagg.serve.launch.fleet_messages import (
    AnyOrder,
    CommandAnswered,
    CommandGiven,
    InstanceDrained,
    InstanceFaulty,
    MetricsGiven,
    MetricsWanted,
    RestartRouters,
    RouterListening,
    RouterTask,
    RouterUp,
    SignOfLife,
    TenantsTold,
    ToFleet,
    WorkloadTold,
)
from disagg.serve.launch.gathered_metrics import MetricsGathering
from disagg.serve.launch.launcher import CONFIGURATION_STATUS
from disagg.serve.launch.operator import LocalOperator
from disagg.serve.launch.process import Exit
from disagg.serve.launch.router_child import RouterChild
from disagg.serve.launch.server_address import parse_host_port, zmq_endpoint
from disagg.serve.launch.server_observer import ServerObserver

_MAX_PORT: Final = 65536
END_S: Final = 3.0
"""What a router gets on top of its time to drain before it is killed."""

logger = logging.getLogger(__name__)


class RouterProcesses:
    """The routers' processes: one for each slot, and those that are retiring. ``of_fleet``: see MetricsGathering."""

    def __init__(
        self,
        deployment: Deployment,
        bound: socket.socket,
        keeper: FleetKeeper,
        task: RouterTask,
        observer: ServerObserver,
        of_fleet: Callable[[], bytes],
    ) -> None:
        self._deployment = deployment
        self._bound = bound
        self._keeper = keeper
        self._task = task
        self._observer = observer
        self._endpoint_base = task.endpoint
        self._current: dict[int, RouterChild] = {}
        self._lives: dict[RouterChild, asyncio.Task[None]] = {}
        self._policies = [RestartPolicy(RestartSettings()) for _ in range(self._num)]
        self._num_lives = [0] * self._num
        self._is_stopping = False
        self._restarting: asyncio.Task[None] | None = None
        self._metrics = MetricsGathering(of_fleet)
        self._answering: set[asyncio.Task[None]] = set()
        self.operator: LocalOperator | None = None
        self.failed: asyncio.Future[DisaggError] = asyncio.get_running_loop().create_future()

    @property
    def _num(self) -> int:
        return self._deployment.front.routers or 1

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the routers that take clients, by slot."""
        return tuple(child.pid for _, child in sorted(self._current.items()) if child.pid is not None)

    def start(self) -> None:
        """Start one router for each slot, and go on to watch them."""
        for slot in range(self._num):
            self._current[slot] = self._begin(slot)
        self._watching = asyncio.create_task(self._watch_silence(), name="routers' signs of life")

    async def wait_serving(self) -> None:
        """Return once all routers take clients."""
        while waiting := [child for child in self._current.values() if not child.is_serving.is_set()]:
            await waiting[0].is_serving.wait()

    def restart(self) -> str:
        """Begin to start all routers anew; raise ConfigurationError while that is under way already."""
        if self._restarting is not None and not self._restarting.done():
            raise ConfigurationError("the routers are being started anew already")
        self._restarting = asyncio.create_task(self._restart(), name="restart of the routers")
        timeout_s = self._deployment.front.restart_timeout_s
        return f"{self._num} routers are started anew; requests under way have {timeout_s:g} s to finish"

    async def stop(self, timeout_s: float) -> None:
        """Let all routers finish what is under way, and end them. May be called twice."""
        self._is_stopping = True
        self._watching.cancel()
        if self._restarting is not None:
            self._restarting.cancel()
        for child in self._lives:
            child.retire(timeout_s, is_restart=False)
        lives = set(self._lives.values())
        if lives and (await asyncio.wait(lives, timeout=timeout_s + END_S))[1]:
            self.kill()
            await asyncio.wait(lives)

    def kill(self) -> None:
        """Kill all routers at once."""
        self._is_stopping = True
        for child in self._lives:
            child.end()

    # Lives ----------------------------------------------------------------------------------------------------

    def _begin(self, slot: int) -> RouterChild:
        self._num_lives[slot] += 1
        name = RouterId(f"{slot}.{self._num_lives[slot]}")
        child = RouterChild(name, slot, self._hear)
        self._lives[child] = asyncio.create_task(self._live(child), name=f"life of router {name}")
        self._lives[child].add_done_callback(self._note_end)
        return child

    def _endpoint(self, child: RouterChild) -> str:
        return f"{self._endpoint_base}-{child.name}"

    def _outside_endpoint(self, child: RouterChild) -> str:
        """Return where a router listens for other hosts: at the first port behind the server's that no other has."""
        listen = self._deployment.remote.listen_instances
        if listen is None:
            return ""
        host, port = parse_host_port(listen, "--listen-instances")
        if port:
            taken = {life.outside_port for life in self._lives}
            port = child.outside_port = next(one for one in range(port + 1, _MAX_PORT) if one not in taken)
        return zmq_endpoint(host, port)

    async def _live(self, child: RouterChild) -> None:
        outside = self._outside_endpoint(child)
        task = structs.replace(self._task, name=child.name, endpoint=self._endpoint(child), outside_endpoint=outside)
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        try:
            ended = await child.live(task, self._bound, self._observer.instance_line)
        finally:
            del self._lives[child]
            self._keeper.router_gone(child)
            Path(self._endpoint(child).removeprefix("ipc://")).unlink(missing_ok=True)
        if self._is_stopping or self._current.get(child.slot) is not child:
            return
        if not child.is_serving.is_set() and self._num_lives[child.slot] == 1:
            self._fail(child, ended)
            return
        delay_s = self._policies[child.slot].delay_s(loop.time() - started_s if child.is_serving.is_set() else None)
        logger.error("%s died: %s; its streams are lost, it is started again", child.label, ended.describe())
        await self._revive(child.slot, delay_s, ended)

    async def _revive(self, slot: int, delay_s: float | None, ended: Exit) -> None:
        """Start a router in the place of one that died."""
        if delay_s is None:
            del self._current[slot]
            if not self._current and not self.failed.done():
                self.failed.set_result(UnavailableError(f"all routers died too often; last: {ended.describe()}"))
            return
        await asyncio.sleep(delay_s)
        if not self._is_stopping:
            self._current[slot] = self._begin(slot)

    def _note_end(self, life: asyncio.Task[None]) -> None:
        if not life.cancelled() and (error := life.exception()) is not None and not self.failed.done():
            logger.error("the %s failed", life.get_name(), exc_info=error)
            self.failed.set_result(InternalError(f"the {life.get_name()} failed: {error}"))

    def _fail(self, child: RouterChild, ended: Exit) -> None:
        if not self.failed.done():
            kind = ConfigurationError if ended.status == CONFIGURATION_STATUS else UnavailableError
            self.failed.set_result(kind(f"{child.label} could not start: {ended.error() or ended.describe()}"))

    async def _restart(self) -> None:
        """Put a new process in the place of each router, one by one; one that does not start changes nothing."""
        for slot in sorted(self._current):
            new = self._begin(slot)
            serving = asyncio.create_task(new.is_serving.wait())
            waiting: set[asyncio.Future[Any]] = {serving, self._lives[new]}
            await asyncio.wait(
                waiting, timeout=self._deployment.router.start_timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if not serving.done():
                serving.cancel()
                new.end("it did not begin to serve")
                logger.error("a new router did not begin to serve: the routers that run stay")
                return
            old = self._current.get(slot)  # another one than before, if that died meanwhile
            self._current[slot] = new
            if old is not None:
                old.retire(self._deployment.front.restart_timeout_s, is_restart=True)
            logger.info("%s is started anew; the old process finishes what it has", new.label)

    async def _watch_silence(self) -> None:
        """End routers that give no sign of life."""
        limit_s, loop = self._deployment.router.instance_timeout_s, asyncio.get_running_loop()
        while True:
            await asyncio.sleep(limit_s / 4)
            for child in self._lives:
                if child.is_up and loop.time() - child.last_seen_s > limit_s:
                    child.end(f"no sign of life for {limit_s:g} s")

    # Messages -------------------------------------------------------------------------------------------------

    def _hear(self, child: RouterChild, message: ToFleet) -> None:
        match message:
            case RouterUp():
                self._keeper.router_up(child, self._endpoint(child))
            case RouterListening(outside_port=port):
                self._keeper.router_listening(child, port)
            case InstanceFaulty():
                self._keeper.router_says_faulty(message)
            case InstanceDrained(instance=instance):
                self._keeper.router_has_drained(child, instance)
            case WorkloadTold(report=report):
                self._keeper.router_tells_workload(child, report)
            case TenantsTold(shares=shares):
                self._keeper.router_tells_tenants(child, shares)
            case SignOfLife():
                self._keeper.show_changes(child)
            case CommandGiven():
                answering = asyncio.create_task(self._answer(child, message), name="answer to a router")
                self._answering.add(answering)
                answering.add_done_callback(self._answering.discard)
            case MetricsWanted(number=number):
                serving = [one for one in self._lives if one.is_serving.is_set()]
                self._metrics.gather(child, number, serving)
            case MetricsGiven():
                self._metrics.take(child, message)

    async def _answer(self, child: RouterChild, given: CommandGiven) -> None:
        try:
            instance, words = await self._carry_out(given.command)
        except ConfigurationError as error:
            child.tell(CommandAnswered(number=given.number, error=str(error)))
        else:
            child.tell(CommandAnswered(number=given.number, instance=instance, words=words))

    async def _carry_out(self, command: AnyOrder) -> tuple[InstanceId, str]:
        assert self.operator is not None, "commands come once the server runs"
        match command:
            case Drain(instance=instance, leave=True):
                return instance, await self.operator.remove(instance, force=command.force)
            case Drain(instance=instance):
                return instance, await self.operator.drain(instance, force=command.force)
            case Undrain(instance=instance):
                return instance, await self.operator.undrain(instance)
            case ChangeRole(instance=instance, role=role):
                return instance, await self.operator.flip(instance, role, force=command.force)
            case AddInstance(role=role):
                return await self.operator.add(role)
            case MeasureLinks():
                await self.operator.measure_links()
                return InstanceId(""), ""
            case RestartRouters():
                return InstanceId(""), await self.operator.restart()
