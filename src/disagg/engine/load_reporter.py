"""When an instance says how busy it is: soon after a change, and regularly as a sign of life."""

import math
from collections.abc import Callable
from typing import Final, Protocol

from disagg.base.ids import InstanceId
from disagg.base.messages import InstanceLoad, LoadReport, Message

SHORTEST_INTERVAL_S: Final = 0.05
LONGEST_INTERVAL_S: Final = 1.0


class MessageSink(Protocol):
    """Takes messages to the router."""

    def send(self, message: Message) -> None:
        """Queue a message."""


class LoadReporter:
    """Sends load reports: at most one in 50 ms, at least one a second while the loop turns."""

    def __init__(self, instance: InstanceId, incarnation: str, channel: MessageSink) -> None:
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

    def update(self, count_load: Callable[[], InstanceLoad], now: float) -> None:
        """Something may have changed: send a report when one is due. The load is only counted then."""
        if now < self._sent_s + SHORTEST_INTERVAL_S:
            self._may_have_changed = True
            return
        load = count_load()
        self._may_have_changed = load != self._sent
        if now >= self.due_s:
            self._channel.send(LoadReport(instance=self._instance, incarnation=self._incarnation, load=load))
            self._sent, self._sent_s, self._may_have_changed = load, now, False
