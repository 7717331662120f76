"""Instances of other hosts in a fleet with several routers: the door lets them in, all routers are told of them."""

from disagg.base.ids import InstanceId
from disagg.base.request import Role
from disagg.scheduling.dispatch.events import Drain, Join
from disagg.serve.launch.fleet_keeper import FleetKeeper
from disagg.serve.router.live import LiveRouter


class FleetGuests:
    """The MemberListener of a ``FleetKeeper``, whose own router is ``router``."""

    def __init__(self, keeper: FleetKeeper, router: LiveRouter) -> None:
        self._keeper = keeper
        self._router = router

    def instance_joined(self, instance: InstanceId, role: Role) -> None:
        """See MemberListener."""
        self._keeper.guest_joins(Join(instance=instance, role=role))

    def instance_asks_to_leave(self, instance: InstanceId) -> None:
        """See MemberListener. It goes whatever is left to serve, so the command is forced."""
        self._keeper.command(Drain(instance=instance, leave=True, force=True))

    def instance_left(self, instance: InstanceId) -> None:
        """See MemberListener. The keeper hears of it as its router's watcher, and tells the others."""
        self._router.instance_left(instance)

    def instance_returns(self, instance: InstanceId, detail: str) -> None:
        """See MemberListener."""
        self._keeper.instance_exited(instance, detail)
        if self._router.has_instance(instance):
            self._keeper.instance_starting(instance)

    def has_instance(self, instance: InstanceId) -> bool:
        """See MemberListener."""
        return self._router.has_instance(instance)

    def takes_requests(self, instance: InstanceId) -> bool:
        """See MemberListener."""
        return self._router.takes_requests(instance)
