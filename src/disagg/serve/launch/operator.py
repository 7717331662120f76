"""An operator's commands on a deployment of local processes: what the router decides, and who starts processes."""

import logging
import os
from collections.abc import Sequence
from itertools import count

from disagg.base.config import InstanceSettings
from disagg.base.errors import ConfigurationError
from disagg.base.ids import InstanceId
from disagg.base.request import Role
from disagg.base.units import format_ranges
from disagg.scheduling.dispatch.events import ChangeRole, Drain, Join, Undrain
from disagg.serve.launch.cluster_manager import ClusterManager
from disagg.serve.launch.deployment import Deployment, plan_addition
from disagg.serve.launch.launcher import Launcher
from disagg.serve.router.live import LiveRouter

logger = logging.getLogger(__name__)


class LocalOperator:
    """See ``Operator``. ``planned`` are the instances that the server began with; a ``manager`` starts further ones."""

    def __init__(
        self,
        deployment: Deployment,
        planned: Sequence[InstanceSettings],
        router: LiveRouter,
        launcher: Launcher,
        manager: ClusterManager | None = None,
    ) -> None:
        self._deployment = deployment
        self._planned = planned
        self._router = router
        self._launcher = launcher
        self._manager = manager
        self._used = {settings.instance for settings in planned}

    def drain(self, instance: InstanceId, *, force: bool) -> str:
        """See Operator."""
        self._router.command(Drain(instance=instance, force=force))
        return f"{instance} gets no new requests and gives its running answers to others"

    def undrain(self, instance: InstanceId) -> str:
        """See Operator."""
        self._router.command(Undrain(instance=instance))
        return f"{instance} gets requests again"

    def remove(self, instance: InstanceId, *, force: bool) -> str:
        """See Operator."""
        self._router.command(Drain(instance=instance, leave=True, force=force))
        return f"{instance} gives its running answers to others and ends"

    def flip(self, instance: InstanceId, role: Role, *, force: bool) -> str:
        """See Operator."""
        self._router.command(ChangeRole(instance=instance, role=role, force=force))
        return f"{instance} is a {role.value} instance from now on; its KV cache stays"

    def measure_links(self) -> None:
        """See Operator."""
        self._router.measure_links()

    def add_wanted(self, role: Role) -> None:
        """Start one more instance that the router wants; where that is impossible, say why and leave it."""
        try:
            _, words = self.add(role)
        except ConfigurationError as error:
            logger.warning("one more %s instance is wanted, and cannot be started: %s", role.value, error)
        else:
            logger.info(words)

    def add(self, role: Role) -> tuple[InstanceId, str]:
        """See Operator."""
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
