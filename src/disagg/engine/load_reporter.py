"""When an instance says how busy it is: soon after a change, and regularly as a sign of life."""

import math
from collections.abc import Callable
from typing import Final, Protocol

from msgspec import structs

from disagg.base.ids import InstanceId, RouterId
from disagg.base.message_fields import Message
from disagg.base.messages import InstanceLoad, LoadReport
from disagg.base.router_messages import ForeignLoad

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


class LoadReporter:
    """Sends load reports: at most one in 50 ms, at least one a second while the loop turns."""

    def __init__(self, instance: InstanceId, incarnation: str, channel: LoadSink) -> None:
        self._instance = instance
        self._incarnation = incarnation
        self._channel = channel
        self._sent: InstanceLoad | None = None
        self._sent_s = -math.inf
        self._may_have_changed = True

    @property
    def due_s(self) -> float:
        """When to look again, if nothing happens before."""
        return self._sent_s + (SHORTEST_INTERVAL_S if self._may_have_changed else LONGEST_INTERVAL_S)

    def report_soon(self) -> None:
        """Somebody is there who has heard no report."""
        self._sent = None

    def update(
        self, count_load: Callable[[], InstanceLoad], count_foreign: Callable[[RouterId], ForeignLoad], now: float
    ) -> None:
        """Something may have changed: send a report when one is due. Loads are only counted then.

        ``count_foreign`` returns what is not the work of a router.
        """
        if now < self._sent_s + SHORTEST_INTERVAL_S:
            self._may_have_changed = True
            return
        load = count_load()
        self._may_have_changed = load != self._sent
        if now >= self.due_s:
            report = LoadReport(instance=self._instance, incarnation=self._incarnation, load=load)
            if routers := self._channel.routers:
                for router in routers:
                    self._channel.send_to(router, structs.replace(report, foreign=count_foreign(router)))
            else:
                self._channel.send(report)
            self._sent, self._sent_s, self._may_have_changed = load, now, False
