"""When an instance says how busy it is: soon after a change, and regularly as a sign of life."""

import math
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
        self._is_changed = True

    @property
    def due_s(self) -> float:
        """When the next report is to be sent, if nothing changes before."""
        return self._sent_s + (SHORTEST_INTERVAL_S if self._is_changed else LONGEST_INTERVAL_S)

    def update(self, load: InstanceLoad, now: float) -> None:
        """Send a report when one is due."""
        self._is_changed = load != self._sent
        if now >= self.due_s:
            self._channel.send(LoadReport(instance=self._instance, incarnation=self._incarnation, load=load))
            self._sent, self._sent_s, self._is_changed = load, now, False
