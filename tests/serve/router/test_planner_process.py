"""A planner that does not answer: the router is told, and goes on."""

import asyncio
import sys

import pytest

from disagg.base.config import RouterSettings, SchedulerSettings
from disagg.base.messages import StepCosts
from disagg.scheduling.replan.placements import RoleCounts
from disagg.scheduling.replan.question import PlanQuestion
from disagg.scheduling.router.inputs import Planned, PlanningFailed
from disagg.serve.router.planner_process import PlannerProcess

COSTS = StepCosts(step_s=0.01, token_s=1e-4, square_s=0.0, prefill_s=0.0, context_s=0.0, decode_s=0.0)
QUESTION = PlanQuestion(
    placements=(RoleCounts(1, 1),),
    requests=(),
    router=RouterSettings(),
    scheduler=SchedulerSettings(),
    prefill_costs=COSTS,
    decode_costs=COSTS,
    pool_tokens=1000,
    hand_over_s=0.0,
    hand_over_token_s=0.0,
    join_s=1.0,
    horizon_s=1.0,
)


@pytest.mark.parametrize(
    "command", [("/no/such/planner",), (sys.executable, "-c", "print('nonsense')"), (sys.executable, "-c", "1 / 0")]
)
async def test_no_answer_is_told(command: tuple[str, ...]):
    told: asyncio.Future[Planned | PlanningFailed] = asyncio.get_running_loop().create_future()
    PlannerProcess(told.set_result, command).ask(QUESTION)
    async with asyncio.timeout(30):
        assert isinstance(await told, PlanningFailed)


async def test_one_that_is_at_work_ends_with_the_server():
    told: list[Planned | PlanningFailed] = []
    planner = PlannerProcess(told.append, (sys.executable, "-c", "import time; time.sleep(1000)"))
    planner.ask(QUESTION)
    await asyncio.sleep(0)
    async with asyncio.timeout(30):
        await planner.close()
    assert told == []
