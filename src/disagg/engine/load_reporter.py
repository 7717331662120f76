"""When an instance says how busy it is: soon after sequences come or go, and regularly as a sign of life."""

import math
from typing import Final, Protocol

from msgspec import structs

from disagg.base.ids import InstanceId, RouterId
from disagg.base.message_fields import Message
from disagg.base.messages import InstanceLoad, LoadReport
from disagg.base.router_messages import ForeignLoad
from disagg.scheduling.step.statistics import Occupancy

SHORTEST_INTERVAL_S: Final = 0.05
LONGEST_INTERVAL_S: Final = 1.0


class LoadSink(Protocol):
    """Takes messages to the routers."""

    @property
    def routers(self) -> tuple[RouterId, ...]:
        """All of them; none where there is only one."""

    def send(self, message: Message) -> None:
        """Queue a message for all."""

    def send_to(self, router: RouterId, message: Message) -> None:
        """Queue a message for one."""


class LoadSource(Protocol):
    """Counts an instance's load."""

    @property
    def occupancy(self) -> Occupancy:
        """What of the load is news."""

    def load(self) -> InstanceLoad:
        """Return how busy the instance is, and its counters."""

    def load_of_others(self, router: RouterId) -> ForeignLoad:
        """Return what of the load is not this router's."""


class LoadReporter:
    """Sends load reports: at most one in 50 ms, at least one a second while the loop turns.

    Steps that only go on are told with the sign of life: counting all of a load costs as much as planning a step. Where
    there are several routers, each one learns soon how far the sequences of the others have come.
    """

    def __init__(self, instance: InstanceId, incarnation: str, channel: LoadSink) -> None:
        self._instance = instance
        self._incarnation = incarnation
        self._channel = channel
        self._sent: Occupancy | None = None
        self._sent_s = -math.inf
        self._may_have_changed = True

    @property
    def due_s(self) -> float:
        """When to look again, if nothing happens before."""
        return self._sent_s + (SHORTEST_INTERVAL_S if self._may_have_changed else LONGEST_INTERVAL_S)

    def report_soon(self) -> None:
        """Somebody is there who has heard no report."""
        self._sent = None

    def update(self, source: LoadSource, now: float) -> None:
        """Something may have changed: send a report when one is due. Loads are only counted then."""
        if now < self._sent_s + SHORTEST_INTERVAL_S:
            self._may_have_changed = True
            return
        routers, occupancy = self._channel.routers, source.occupancy
        self._may_have_changed = bool(routers) or occupancy != self._sent
        if now >= self.due_s:
            report = LoadReport(instance=self._instance, incarnation=self._incarnation, load=source.load())
            for router in routers:
                self._channel.send_to(router, structs.replace(report, foreign=source.load_of_others(router)))
            if not routers:
                self._channel.send(report)
            self._sent, self._sent_s, self._may_have_changed = occupancy, now, False
