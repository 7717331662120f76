"""What the objectives of a server decide where nobody said otherwise: queues, steps, roles. Pure."""

import msgspec

from disagg.base.config import QueueOrder, RouterSettings, SchedulerSettings, SchedulingMode
from disagg.base.objectives import NO_OBJECTIVES, Objectives


def queue_order(asked: QueueOrder | None, objectives: Objectives) -> QueueOrder:
    """Return the order that was asked for; else by deadlines where there is a TTFT objective."""
    if asked is not None:
        return asked
    return QueueOrder.PRIORITY if objectives.ttft_s is None else QueueOrder.EDF


def scheduling_mode(settings: SchedulerSettings) -> SchedulingMode:
    """Return the mode that was asked for; else steps are sized by slack where a TPOT objective says what that is."""
    if settings.scheduling is not None:
        return settings.scheduling
    return SchedulingMode.CHUNKED if settings.objectives.tpot_s is None else SchedulingMode.SLACK


def with_roles(router: RouterSettings, objectives: Objectives) -> RouterSettings:
    """Return the settings as asked for; else with roles as leanings where objectives say what is good enough."""
    if router.strict_roles is not None or objectives == NO_OBJECTIVES:
        return router
    return msgspec.structs.replace(router, strict_roles=False)
