"""Who runs the instances of a server that runs none itself: a cluster's own manager, behind one interface."""

import asyncio
from typing import Protocol

from disagg.base.errors import DisaggError
from disagg.base.ids import InstanceId
from disagg.base.request import Role


class HostLost(Protocol):
    """Takes note of a host that is gone."""

    def __call__(self, host: str, why: str, *, returns: bool) -> None:
        """``host`` is what it called itself when it asked to join; its instance starts elsewhere if it ``returns``."""


class ClusterManager(Protocol):
    """Instances on the nodes of a cluster, each of which joins the server as one of another host does."""

    failed: "asyncio.Future[DisaggError]"
    """Done when the server cannot go on."""

    def start(self, server: str, host_lost: HostLost) -> None:
        """Place the instances, and go on to watch them. They join at ``server``, HOST:PORT."""

    def add(self, role: Role) -> InstanceId:
        """Place one more, and return what it would be called."""

    async def stop(self) -> None:
        """End all of them. May be called twice."""
