"""An operator's commands on a deployment of local processes: what the router decides, and who starts processes."""

import logging
import os
from collections.abc import Callable, Sequence
from itertools import count
from typing import Protocol

from disagg.base.config import InstanceSettings
from disagg.base.errors import ConfigurationError
from disagg.base.ids import InstanceId
from disagg.base.request import Role
from disagg.base.units import format_ranges
from disagg.scheduling.dispatch.events import ChangeRole, Drain, Join, Undrain
from disagg.scheduling.router.inputs import AnyCommand
from disagg.serve.launch.cluster_manager import ClusterManager
from disagg.serve.launch.deployment import Deployment, plan_addition
from disagg.serve.launch.launcher import Launcher

logger = logging.getLogger(__name__)


class CommandTaker(Protocol):
    """Whoever decides on commands. See LiveRouter."""

    def command(self, command: AnyCommand) -> None:
        """Change the deployment; raise ConfigurationError, with the reason, where that cannot be done."""

    def measure_links(self) -> None:
        """Let all links be measured anew."""

    def has_instance(self, instance: InstanceId) -> bool:
        """True for the name of an instance of the deployment."""


class LocalOperator:
    """See ``Operator``. ``planned`` are the instances that the server began with; a ``manager`` starts further ones."""

    def __init__(
        self,
        deployment: Deployment,
        planned: Sequence[InstanceSettings],
        router: CommandTaker,
        launcher: Launcher,
        manager: ClusterManager | None = None,
        restart: Callable[[], str] | None = None,
    ) -> None:
        self._deployment = deployment
        self._planned = planned
        self._router = router
        self._launcher = launcher
        self._manager = manager
        self._restart = restart
        self._used = {settings.instance for settings in planned}

    async def drain(self, instance: InstanceId, *, force: bool) -> str:
        """See Operator."""
        self._router.command(Drain(instance=instance, force=force))
        return f"{instance} gets no new requests and gives its running answers to others"

    async def undrain(self, instance: InstanceId) -> str:
        """See Operator."""
        self._router.command(Undrain(instance=instance))
        return f"{instance} gets requests again"

    async def remove(self, instance: InstanceId, *, force: bool) -> str:
        """See Operator."""
        self._router.command(Drain(instance=instance, leave=True, force=force))
        return f"{instance} gives its running answers to others and ends"

    async def flip(self, instance: InstanceId, role: Role, *, force: bool) -> str:
        """See Operator."""
        self._router.command(ChangeRole(instance=instance, role=role, force=force))
        return f"{instance} is a {role.value} instance from now on; its KV cache stays"

    async def measure_links(self) -> None:
        """See Operator."""
        self._router.measure_links()

    def add_wanted(self, role: Role) -> None:
        """Start one more instance that the router wants; where that is impossible, say why and leave it."""
        try:
            _, words = self._add(role)
        except ConfigurationError as error:
            logger.warning("one more %s instance is wanted, and cannot be started: %s", role.value, error)
        else:
            logger.info(words)

    async def add(self, role: Role) -> tuple[InstanceId, str]:
        """See Operator."""
        return self._add(role)

    async def restart(self) -> str:
        """See Operator."""
        if self._restart is None:
            raise ConfigurationError(
                "this server's one process runs the instances as well: start it with --routers N to start routers anew"
            )
        return self._restart()

    def _add(self, role: Role) -> tuple[InstanceId, str]:
        if self._manager is not None:
            placed = self._manager.add(role)
            return placed, f"{placed} starts where the cluster has room for it"
        names = (InstanceId(f"{role.value}-{number}") for number in count())
        name = next(name for name in names if name not in self._used and not self._router.has_instance(name))
        present = self._launcher.settings
        cores = sorted(os.sched_getaffinity(0))
        settings = plan_addition(self._deployment, self._planned, present, name, role, cores)
        self._router.command(Join(instance=name, role=role))
        self._used.add(name)
        self._launcher.add(settings)
        return name, f"{name} starts on core {format_ranges(settings.cpus)}{_shared(settings, present)}"


def _shared(added: InstanceSettings, present: Sequence[InstanceSettings]) -> str:
    others = [settings.instance for settings in present if not set(settings.cpus).isdisjoint(added.cpus)]
    return f", which it shares with {', '.join(others)}: no other core is left" if others else ""
