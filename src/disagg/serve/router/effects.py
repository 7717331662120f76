"""Who brings about what a router decides beyond the instances that there are."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from disagg.base.request import Role
from disagg.scheduling.dispatch.events import ChangeRole, Drain
from disagg.scheduling.dispatch.tenant_shares import TenantShare
from disagg.scheduling.dispatch.workload_report import WorkloadReport
from disagg.scheduling.replan.question import PlanQuestion

logger = logging.getLogger(__name__)


def _add_nothing(role: Role) -> None:
    logger.warning("one more %s instance is wanted, and nobody here starts any", role.value)


def _tell_nobody(_: object) -> None:
    """This router is the only one."""


@dataclass(frozen=True, slots=True)
class RouterEffects:
    """Functions that begin something and return at once; none may raise."""

    add_instance: Callable[[Role], None] = _add_nothing
    """Starts one more instance of a role, and lets it join."""
    ask_planner: Callable[[PlanQuestion], None] | None = None
    """Has a question answered, in its own time."""
    change_fleet: Callable[[Drain | ChangeRole], None] = _tell_nobody
    """Lets this be done in all routers of the server."""
    report_workload: Callable[[WorkloadReport], None] = _tell_nobody
    """Tells the keeper of the fleet what has come here."""
    report_tenants: Callable[[tuple[TenantShare, ...]], None] = _tell_nobody
    """Tells the other routers what is here of those who share the server."""


NO_EFFECTS: Final = RouterEffects()
