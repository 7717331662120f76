"""What a starting and running server shows to whoever started it."""

from typing import Protocol

from disagg.base.ids import InstanceId
from disagg.base.messages import InstanceFacts
from disagg.serve.router.interface import InstanceStatus


class ServerObserver(Protocol):
    """Shows what happens. No method may block or raise."""

    def model_read(self, model: str, *, can_chat: bool) -> None:
        """The model's files are there; ``can_chat`` when it has a chat template."""

    def instance_loading(self, instance: InstanceId, stage: str, fraction: float) -> None:
        """A starting instance got this far; ``fraction`` from 0 to 1."""

    def instance_ready(self, instance: InstanceId, facts: InstanceFacts) -> None:
        """An instance takes requests."""

    def instance_line(self, instance: InstanceId, line: str) -> None:
        """An instance wrote a line to its error output."""

    def instance_lost(self, instance: InstanceId, how: str, restart_in_s: float | None) -> None:
        """An instance died; it is started again in so many seconds, or given up (None)."""

    def instance_left(self, instance: InstanceId) -> None:
        """An operator removed an instance."""

    def server_ready(self, url: str, model: str, instances: tuple[InstanceStatus, ...]) -> None:
        """All instances take requests, and the API answers for ``model`` at ``url``."""

    def server_stopping(self, why: str, drain_s: float) -> None:
        """The server ends; requests under way have ``drain_s`` to finish."""
