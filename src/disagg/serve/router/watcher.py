"""What the router tells to whoever runs and shows the instances."""

from typing import Protocol

from disagg.base.ids import InstanceId
from disagg.base.messages import InstanceFacts


class InstanceWatcher(Protocol):
    """Who starts and shows instances. No method may block or raise."""

    def instance_loading(self, instance: InstanceId, stage: str, fraction: float) -> None:
        """A starting instance got this far; ``fraction`` from 0 to 1."""

    def instance_ready(self, instance: InstanceId, facts: InstanceFacts) -> None:
        """The instance takes requests."""

    def instance_faulty(self, instance: InstanceId, why: str) -> None:
        """The instance is silent or talks nonsense: end its process."""

    def restart_instance(self, instance: InstanceId, delay_s: float) -> None:
        """The instance's process is gone: start it again after ``delay_s``."""

    def give_up_instance(self, instance: InstanceId, nothing_left: bool) -> None:
        """The instance's process is gone for good; ``nothing_left`` when no request can be served without it."""

    def instance_drained(self, instance: InstanceId) -> None:
        """The instance holds nothing of this router's any more, and is given nothing new."""

    def instance_leaving(self, instance: InstanceId) -> None:
        """The instance is to leave and was asked to end: see that its process does, and report its end."""

    def instance_left(self, instance: InstanceId) -> None:
        """The instance does not belong to the deployment any more."""


class NullWatcher:
    """An InstanceWatcher for a router whose instances nobody manages."""

    def instance_loading(self, instance: InstanceId, stage: str, fraction: float) -> None:
        """See InstanceWatcher."""

    def instance_ready(self, instance: InstanceId, facts: InstanceFacts) -> None:
        """See InstanceWatcher."""

    def instance_faulty(self, instance: InstanceId, why: str) -> None:
        """See InstanceWatcher."""

    def restart_instance(self, instance: InstanceId, delay_s: float) -> None:
        """See InstanceWatcher."""

    def give_up_instance(self, instance: InstanceId, nothing_left: bool) -> None:
        """See InstanceWatcher."""

    def instance_drained(self, instance: InstanceId) -> None:
        """See InstanceWatcher."""

    def instance_leaving(self, instance: InstanceId) -> None:
        """See InstanceWatcher."""

    def instance_left(self, instance: InstanceId) -> None:
        """See InstanceWatcher."""
