"""Helpers of the launch tests: instances without a model, and an observer that remembers."""

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path

import fake_instance

from disagg.base.config import InstanceGroup, Placement, RouterSettings, ServeSettings
from disagg.base.ids import InstanceId
from disagg.base.messages import InstanceFacts
from disagg.base.request import Role
from disagg.serve.launch.deployment import Deployment
from disagg.serve.router.interface import InstanceStatus

FAKE_ENGINE = (sys.executable, str(Path(fake_instance.__file__)))
DEADLINE_S = 60.0
PAIR = Placement(groups=(InstanceGroup(role=Role.PREFILL, count=1), InstanceGroup(role=Role.DECODE, count=1)))


def make_deployment(placement: Placement = PAIR, drain_s: float = 0.0, **router: float) -> Deployment:
    return Deployment(
        placement=placement, serve=ServeSettings(port=0, drain_s=drain_s), router=RouterSettings(**router)
    )


async def wait_until(condition: Callable[[], object]) -> None:
    """Ask again and again until the condition holds."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.001)


class Memory:
    """A ServerObserver that remembers."""

    def __init__(self) -> None:
        self.loading: list[tuple[str, str, float]] = []
        self.ready: list[str] = []
        self.lines: list[tuple[str, str]] = []
        self.lost: list[tuple[str, str, float | None]] = []
        self.left: list[str] = []
        self.url: str | None = None
        self.stopping: str | None = None

    def model_read(self, model: str, *, can_chat: bool) -> None:
        pass

    def instance_loading(self, instance: InstanceId, stage: str, fraction: float) -> None:
        self.loading.append((instance, stage, fraction))

    def instance_ready(self, instance: InstanceId, facts: InstanceFacts) -> None:
        self.ready.append(instance)

    def instance_line(self, instance: InstanceId, line: str) -> None:
        self.lines.append((instance, line))

    def instance_lost(self, instance: InstanceId, how: str, restart_in_s: float | None) -> None:
        self.lost.append((instance, how, restart_in_s))

    def instance_left(self, instance: InstanceId) -> None:
        self.left.append(instance)

    def server_ready(self, url: str, model: str, instances: tuple[InstanceStatus, ...]) -> None:
        self.url = url

    def server_stopping(self, why: str, drain_s: float) -> None:
        self.stopping = why
