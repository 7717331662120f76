"""Forecasts on a host whose instances lend each other their cores: on those without work now, while that lasts."""

import pytest

from disagg.base.ids import Epoch, InstanceId, RequestId
from disagg.base.messages import CostsLearned, StepCosts
from disagg.base.objectives import Objectives
from disagg.base.request import Role
from disagg.base.step_limits import StepLimits
from disagg.scheduling.dispatch.experience import Experience
from disagg.scheduling.dispatch.fleet_facts import FleetFacts
from disagg.scheduling.dispatch.forecaster import Forecaster
from disagg.scheduling.dispatch.state import InstanceEntry, InstanceState, SequenceEntry

COSTS = StepCosts(step_s=0.004, token_s=0.001, square_s=0.0, prefill_s=0.0, context_s=0.0, decode_s=0.0)
PROMPT_S = 0.004 + 0.1
"""A prompt of 100 tokens in one step, on one core."""


def instance(name: str, num_borrowable: int = 1, num_threads: int = 1, prefill_tokens: int = 0) -> InstanceEntry:
    lesson = CostsLearned(
        instance=InstanceId(name), incarnation=name, costs=COSTS, num_prefill_steps=99, num_decode_steps=99
    )
    return InstanceEntry(
        instance=InstanceId(name),
        role=Role.COLOCATED,
        state=InstanceState.READY,
        lesson=lesson,
        limits=StepLimits(num_threads=num_threads, num_borrowable=num_borrowable),
        prefill_tokens=prefill_tokens,
        num_prefills=bool(prefill_tokens),
    )


def prompt() -> SequenceEntry:
    return SequenceEntry(
        request_id=RequestId("a"),
        epoch=Epoch(0),
        num_tokens=100,
        max_total_tokens=110,
        priority=0,
        order=0,
        arrived_s=0.0,
        deadline_s=1e9,
    )


def first_token_s(one: InstanceEntry, *others: InstanceEntry) -> float:
    facts = FleetFacts.of((one, *others), 0.0)
    return Forecaster(facts, Experience(), Objectives(), 0.0).first_token_s(one, prompt(), 100)


def test_a_lone_prompt_is_computed_on_its_neighbours_core_too() -> None:
    assert first_token_s(instance("a"), instance("b")) == pytest.approx(PROMPT_S / 1.9)


def test_a_neighbour_with_work_keeps_its_core() -> None:
    assert first_token_s(instance("a"), instance("b", prefill_tokens=50)) == pytest.approx(PROMPT_S)


@pytest.mark.parametrize(("busy_part", "speed"), [(0.0, 1.9), (0.5, 1.45), (1.0, 1.0), (2.0, 1.0)])
def test_a_core_is_counted_on_for_the_part_of_the_time_for_which_prompts_have_left_it(
    busy_part: float, speed: float
) -> None:
    one, other = instance("a"), instance("b")
    for second in range(-200, 0):  # of the two cores' time, so much went to prompts
        one.prefill_work.add(2 * busy_part, second)
    assert first_token_s(one, other) == pytest.approx(PROMPT_S / speed, rel=0.1)


def test_what_others_prefill_who_lend_nothing_takes_no_core_away() -> None:
    one, other, apart = instance("a"), instance("b"), instance("c", num_borrowable=0)
    for second in range(-200, 0):
        apart.prefill_work.add(1.0, second)
    assert first_token_s(one, other, apart) == pytest.approx(PROMPT_S / 1.9)


def test_who_lends_nothing_borrows_nothing() -> None:
    assert first_token_s(instance("a", num_borrowable=0), instance("b", num_borrowable=0)) == pytest.approx(PROMPT_S)
    assert first_token_s(instance("a"), instance("b", num_borrowable=0)) == pytest.approx(PROMPT_S)


def test_those_with_work_share_what_is_idle() -> None:
    wide = instance("c", num_borrowable=2, num_threads=2)
    assert first_token_s(instance("a"), instance("b", prefill_tokens=50), wide) == pytest.approx(PROMPT_S / 1.9)
    one = instance("c")
    assert first_token_s(instance("a"), instance("b", prefill_tokens=50), one) == pytest.approx(PROMPT_S / 1.45)


def test_an_answer_gains_less() -> None:
    one, other = instance("a"), instance("b")
    forecaster = Forecaster(FleetFacts.of((one, other), 0.0), Experience(), Objectives(), 0.0)
    assert forecaster.later_token_s(one, prompt(), ahead_s=0.0) == pytest.approx((COSTS.step_s + COSTS.token_s) / 1.5)
