"""Who runs the instances of a server that runs none itself: a cluster's own manager, behind one interface."""

import asyncio
from collections.abc import Callable
from typing import Protocol

from disagg.base.errors import DisaggError
from disagg.base.ids import InstanceId
from disagg.base.request import Role


class GuestBook(Protocol):
    """The server's side: who is to come, and who is gone."""

    def expect(self, role: Role, host: str) -> InstanceId:
        """Let one more instance belong to the deployment, and return the name under which it is to join."""

    def lost(self, instance: InstanceId, why: str, *, returns: bool) -> None:
        """An instance is gone with its host; another life of it begins elsewhere if it ``returns``."""


class ClusterManager(Protocol):
    """Instances on the nodes of a cluster, each of which joins the server as one of another host does."""

    failed: "asyncio.Future[DisaggError]"
    """Done when the server cannot go on."""

    def start(self, server: str, book: GuestBook) -> None:
        """Place the instances, and go on to watch them. They join at ``server``, HOST:PORT."""

    def add(self, role: Role) -> InstanceId:
        """Place one more, and return its name."""

    async def stop(self) -> None:
        """End all of them. May be called twice."""


ManagerFactory = Callable[[], ClusterManager]
"""Makes, inside the event loop, who runs instances elsewhere."""
