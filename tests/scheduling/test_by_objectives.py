"""What a server's objectives decide where nobody said otherwise."""

import pytest

from disagg.base.config import QueueOrder, RouterSettings, SchedulerSettings, SchedulingMode
from disagg.base.objectives import NO_OBJECTIVES, Objectives
from disagg.scheduling.by_objectives import queue_order, scheduling_mode, with_roles

BOTH = Objectives(ttft_s=0.5, tpot_s=0.05)
TTFT, TPOT = Objectives(ttft_s=0.5), Objectives(tpot_s=0.05)


@pytest.mark.parametrize(
    ("objectives", "order", "mode", "has_walls"),
    [
        (NO_OBJECTIVES, QueueOrder.PRIORITY, SchedulingMode.CHUNKED, True),
        (TTFT, QueueOrder.EDF, SchedulingMode.CHUNKED, False),
        (TPOT, QueueOrder.PRIORITY, SchedulingMode.SLACK, False),
        (BOTH, QueueOrder.EDF, SchedulingMode.SLACK, False),
    ],
)
def test_objectives_decide_what_nobody_asked_for(
    objectives: Objectives, order: QueueOrder, mode: SchedulingMode, has_walls: bool
) -> None:
    assert queue_order(None, objectives) is order
    assert scheduling_mode(SchedulerSettings(objectives=objectives)) is mode
    assert with_roles(RouterSettings(), objectives).has_walls is has_walls


def test_what_was_asked_for_is_done_whatever_the_objectives() -> None:
    asked = SchedulerSettings(objectives=BOTH, scheduling=SchedulingMode.PREFILL_FIRST)
    assert scheduling_mode(asked) is SchedulingMode.PREFILL_FIRST
    assert queue_order(QueueOrder.SJF, BOTH) is QueueOrder.SJF
    assert with_roles(RouterSettings(strict_roles=True), BOTH).has_walls
    assert not with_roles(RouterSettings(strict_roles=False), NO_OBJECTIVES).has_walls


def test_a_router_that_leans_asks_instances_what_their_steps_cost() -> None:
    assert with_roles(RouterSettings(), BOTH).needs_costs
    assert not with_roles(RouterSettings(), NO_OBJECTIVES).needs_costs
