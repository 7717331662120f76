"""Instances on the nodes of a Ray cluster: Ray places them by placement groups and says when one is gone.

Ray carries no request and no KV block: an actor starts a guest on its node, which joins the server over its own socket.
"""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Any, Final, assert_never

import msgspec
import ray
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from disagg.base.clock import Clock, MonotonicClock
from disagg.base.config import CurveKeys, InstanceGroup, Placement, RouterSettings, ServeSettings
from disagg.base.errors import ConfigurationError, DisaggError, UnavailableError
from disagg.base.ids import InstanceId
from disagg.base.request import Role
from disagg.scheduling.router.restart import RestartPolicy, RestartSettings
from disagg.serve.launch.cluster_manager import GuestBook
from disagg.serve.launch.deployment import Deployment
from disagg.serve.launch.guest import GuestOrder
from disagg.serve.launch.launcher import CONFIGURATION_STATUS
from disagg.serve.launch.process import Exit, LineListener
from disagg.serve.launch.ray_host import HostEnded, HostLine, HostNews, HostStarted, RayHost
from disagg.serve.launch.seats import Bench, Seat, Spread, benches, seat

logger = logging.getLogger(__name__)

_LINES_KEPT: Final = 20
_STOP_S: Final = 10.0
"""What guests get to end before their actors are killed."""
_WAIT_S: Final = 10.0
"""After so long without a place, it is said what is waited for."""


@dataclass(eq=False)
class _Group:
    """A bench, and what Ray reserves for it as long as one of its seats is taken."""

    reserved: PlacementGroup
    taken: set[InstanceId]


class RayManager:
    """See ClusterManager. ``deployment`` and ``keys`` are what the instances are told; made inside an event loop."""

    def __init__(
        self, deployment: Deployment, placement: Placement, keys: CurveKeys, listener: LineListener, own_address: str
    ) -> None:
        self._deployment = _for_guests(deployment)
        self._placement = placement
        self._keys = keys
        self._listener = listener
        self._own_address = own_address
        self._clock: Clock = MonotonicClock()
        self._seats: dict[InstanceId, Seat] = {}
        self._actors: dict[InstanceId, Any] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_stopping = False
        self.failed: asyncio.Future[DisaggError] = asyncio.get_running_loop().create_future()

    def start(self, server: str, book: GuestBook) -> None:
        """See ClusterManager."""
        host, _, port = server.rpartition(":")
        self._server = f"{self._own_address if host in ('0.0.0.0', '*') else host}:{port}"
        self._book = book
        for bench in benches(self._placement, self._deployment.host):
            self._place(bench)

    def add(self, role: Role) -> InstanceId:
        """See ClusterManager. It is as those of its role; Ray's autoscaler is asked for the node that lacks."""
        usual = InstanceGroup(role=role, count=1)
        group = next((one for one in self._placement.groups if one.role is role), usual)
        (placed,) = self._place(Bench((seat(group, self._deployment.host),), Spread.APART))
        return placed

    async def stop(self) -> None:
        """See ClusterManager."""
        self._is_stopping = True
        for actor in self._actors.values():
            actor.stop.remote()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_STOP_S)
        for actor in self._actors.values():
            ray.kill(actor)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_STOP_S)

    def _place(self, bench: Bench) -> list[InstanceId]:
        names = [self._book.expect(one.group.role, "the Ray cluster") for one in bench.seats]
        self._seats |= zip(names, bench.seats, strict=True)
        self._ask_for_nodes()
        reserved = placement_group([one.bundle() for one in bench.seats], strategy=bench.spread.value)
        group = _Group(reserved, set(names))
        for index, (name, one) in enumerate(zip(names, bench.seats, strict=True)):
            task = asyncio.create_task(self._keep(name, one, group, index), name=f"watcher of {name}")
            self._tasks.add(task)
            task.add_done_callback(self._note_end)
        return names

    def _ask_for_nodes(self) -> None:
        """Tell Ray's autoscaler what is needed in all; nodes beyond that may go."""
        request_resources(bundles=[one.bundle() for one in self._seats.values()])

    # One instance over all its lives --------------------------------------------------------------------------

    async def _keep(self, name: InstanceId, one: Seat, group: _Group, index: int) -> None:
        restarts = RestartPolicy(RestartSettings())
        try:
            for life in count():
                began_s = self._clock.now()
                ended = await self._live(name, one, group.reserved, index)
                delay_s = None if ended.status == 0 else restarts.delay_s(self._clock.now() - began_s)
                is_last = self._is_stopping or delay_s is None or ended.status == CONFIGURATION_STATUS
                self._book.lost(name, ended.describe(), returns=not is_last)
                if self._is_stopping or ended.status == 0:
                    return  # it was removed
                if delay_s is None or ended.status == CONFIGURATION_STATUS:
                    self._give_up(name, ended, is_first=life == 0)
                    return
                logger.warning("%s is gone: %s; placing it anew", name, ended.describe())
                await asyncio.sleep(delay_s)
        finally:
            self._release(name, group)

    async def _live(self, name: InstanceId, one: Seat, reserved: PlacementGroup, index: int) -> Exit:
        """Run one guest to its end, wherever Ray has room for it."""
        order = GuestOrder(
            deployment=self._deployment, group=one.group, server=self._server, keys=self._keys, instance=name
        )
        actor = self._actors[name] = _actor(one, reserved, index)
        asked_s, lines = self._clock.now(), [""]
        late = asyncio.get_running_loop().call_later(_WAIT_S, _say_waiting, name, one)
        try:
            async for reference in actor.run.remote(msgspec.json.encode(order)):
                news: HostNews = await reference
                match news:
                    case HostStarted():
                        late.cancel()
                        _say_started(name, news, self._clock.now() - asked_s)
                    case HostLine(text=text):
                        lines = [*lines[-_LINES_KEPT:], text]
                        self._listener(name, text)
                    case HostEnded(status=status):
                        return Exit(status=status, last_lines=tuple(lines))
                    case other:
                        assert_never(other)
            return Exit(status=1, fault="its actor ended without a word")
        except RayError as error:
            return Exit(status=1, fault=f"Ray lost it: {_first_line(error)}")
        finally:
            late.cancel()
            del self._actors[name]
            ray.kill(actor)

    def _give_up(self, name: InstanceId, ended: Exit, *, is_first: bool) -> None:
        """Say so; what cannot be at the start, or leaves nobody, ends the server."""
        words = f"{name} is given up: {ended.error() or ended.describe()}"
        logger.error("%s", words)
        is_misfit = is_first and ended.status == CONFIGURATION_STATUS
        if not self.failed.done() and (is_misfit or len(self._seats) == 1):
            self.failed.set_result(ConfigurationError(words) if is_misfit else UnavailableError(words))

    def _release(self, name: InstanceId, group: _Group) -> None:
        """Give back what the seat held, once all of its bench is free."""
        del self._seats[name]
        group.taken.discard(name)
        with suppress(RayError):
            if not group.taken:
                remove_placement_group(group.reserved)
            self._ask_for_nodes()

    def _note_end(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("the %s failed", task.get_name(), exc_info=error)


def _say_started(name: InstanceId, news: HostStarted, took_s: float) -> None:
    devices = f", GPU {news.devices}" if news.devices else ""
    logger.info("%s is placed on %s%s after %.1f s: process %d", name, news.node, devices, took_s, news.pid)


def _say_waiting(name: InstanceId, one: Seat) -> None:
    free = {kind: amount for kind, amount in ray.available_resources().items() if kind in ("CPU", "GPU")}
    logger.warning("%s waits for a node with %s; free in all: %s", name, one.bundle(), free or "nothing")


def _actor(one: Seat, reserved: PlacementGroup, index: int) -> Any:
    """Return an actor on one bundle of a placement group; Ray starts it once there is room."""
    remote: Any = ray.remote(RayHost)
    return remote.options(
        num_cpus=one.num_cpus,
        num_gpus=one.num_gpus,
        max_concurrency=2,  # to be stopped while it runs
        scheduling_strategy=PlacementGroupSchedulingStrategy(reserved, placement_group_bundle_index=index),
    ).remote()


def _for_guests(deployment: Deployment) -> Deployment:
    """Return what instances are told: no key of a client, nothing that is this host's own."""
    return msgspec.structs.replace(
        deployment,
        router=RouterSettings(),
        serve=ServeSettings(drain_s=deployment.serve.drain_s),
        host=msgspec.structs.replace(deployment.host, cpus=(), kv_events=None),
        remote=msgspec.structs.replace(deployment.remote, listen_instances=None, kv_host=None, cluster=None),
    )


def _first_line(error: Exception) -> str:
    lines: Sequence[str] = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
