"""What the router tells to whoever counts: metrics, logs, tests."""

from typing import Protocol

from disagg.base.ids import InstanceId
from disagg.scheduling.dispatch.actions import PathEnded, RefuseReason
from disagg.scheduling.router.outputs import DropReason, HandOverEnded, LinkFound


class RouterSink(Protocol):
    """Takes counts. No method may block or raise."""

    def hand_over_ended(self, ended: HandOverEnded) -> None:
        """An instance pulled KV blocks from another, or did not."""

    def link_found(self, found: LinkFound) -> None:
        """It was measured how fast an instance reads the KV blocks of another."""

    def sequence_refused(self, reason: RefuseReason, priority: int, service_class: str) -> None:
        """A sequence of this priority and class ("": none) was not taken."""

    def sequence_degraded(self, service_class: str) -> None:
        """A sequence is served as best effort."""

    def path_ended(self, ended: PathEnded) -> None:
        """A sequence that went by predictions has its last token."""

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

    def hand_over_ended(self, ended: HandOverEnded) -> None:
        """See RouterSink."""

    def link_found(self, found: LinkFound) -> None:
        """See RouterSink."""

    def sequence_refused(self, reason: RefuseReason, priority: int, service_class: str) -> None:
        """See RouterSink."""

    def sequence_degraded(self, service_class: str) -> None:
        """See RouterSink."""

    def path_ended(self, ended: PathEnded) -> None:
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
