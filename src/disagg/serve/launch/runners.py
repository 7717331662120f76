"""Who runs a server's instances (its launcher, and a cluster's manager where there is one), as one."""

import asyncio
from collections.abc import Sequence
from typing import Any, Final, Protocol

from disagg.base.errors import DisaggError
from disagg.serve.launch.cluster_manager import ClusterManager
from disagg.serve.launch.launcher import Launcher
from disagg.serve.launch.signals import SignalQueue
from disagg.serve.router.outside import OutsideDoor


class FailureSource(Protocol):
    """Something without which a server cannot go on."""

    failed: "asyncio.Future[DisaggError]"
    """Done when it is lost for good."""


class InstanceRunners:
    """``door``: where a manager's instances join. ``beside``: what else a server needs to go on."""

    def __init__(
        self,
        launcher: Launcher,
        manager: ClusterManager | None,
        door: OutsideDoor | None,
        beside: Sequence[FailureSource] = (),
    ) -> None:
        self._launcher: Final = launcher
        self._manager: Final = manager
        self._door: Final = door
        self._sources: list[FailureSource] = [launcher, *beside, *([] if manager is None else [manager])]

    def start(self) -> None:
        """Start all instances."""
        self._launcher.start()
        if self._manager is not None:
            assert self._door is not None, "a manager's instances join"
            self._manager.start(self._door.address, self._door)

    async def wait_ready(self) -> None:
        """Return once all of this host take requests."""
        await self._launcher.wait_ready()

    @property
    def has_failed(self) -> bool:
        """True when the server cannot go on."""
        return any(source.failed.done() for source in self._sources)

    async def until_signal(self, signals: SignalQueue, *others: "asyncio.Future[Any]") -> str | None:
        """Return a signal's name once one has come, or None once one of ``others`` is done.

        Raises the DisaggError with which the server cannot go on.
        """
        stopped = asyncio.create_task(signals.next(), name="signal")
        try:
            ends: set[asyncio.Future[Any]] = {stopped, *(source.failed for source in self._sources), *others}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
        for source in self._sources:
            if source.failed.done():
                raise source.failed.result()
        return None if any(other.done() for other in others) else stopped.result().name

    async def stop(self) -> None:
        """End all instances. May be called twice."""
        await self._launcher.stop()
        if self._manager is not None:
            await self._manager.stop()

    def kill(self) -> None:
        """End those of this host at once."""
        self._launcher.kill()
