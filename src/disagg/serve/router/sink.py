"""What the router tells to whoever counts: metrics, logs, tests."""

from typing import Protocol

from disagg.base.ids import InstanceId
from disagg.scheduling.router.outputs import DropReason


class RouterSink(Protocol):
    """Takes counts. No method may block or raise."""

    def hand_over_ended(
        self, source: InstanceId, target: InstanceId, num_bytes: int, duration_s: float, failure: str
    ) -> None:
        """``target`` pulled KV blocks from ``source``, or did not: then ``failure`` says why."""

    def message_dropped(self, instance: InstanceId, reason: DropReason) -> None:
        """A message was not used."""

    def instance_lost(self, instance: InstanceId) -> None:
        """An instance that had been ready died or was declared dead."""

    def sequence_resumed(self) -> None:
        """A sequence lost its instance and goes on elsewhere."""

    def sequence_migrated(self) -> None:
        """A running sequence is handed over to another instance, which pulls its KV blocks."""

    def pause_ended(self, pause_s: float) -> None:
        """The next token of such a sequence has come, so long after the loss."""


class NullSink:
    """A RouterSink that counts nothing."""

    def hand_over_ended(
        self, source: InstanceId, target: InstanceId, num_bytes: int, duration_s: float, failure: str
    ) -> None:
        """See RouterSink."""

    def message_dropped(self, instance: InstanceId, reason: DropReason) -> None:
        """See RouterSink."""

    def instance_lost(self, instance: InstanceId) -> None:
        """See RouterSink."""

    def sequence_resumed(self) -> None:
        """See RouterSink."""

    def sequence_migrated(self) -> None:
        """See RouterSink."""

    def pause_ended(self, pause_s: float) -> None:
        """See RouterSink."""
