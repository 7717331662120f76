"""A decode step that is repeated: what became of its sequences is what single steps would have made of them."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg.base.config import SchedulerSettings
from disagg.base.ids import Epoch, RequestId
from disagg.base.sampling import FinishReason
from disagg.scheduling.step.actions import AnyAction, Emit, RunStep
from disagg.scheduling.step.events import AnyEvent, Arrived, Cancelled, StepDone, StepResult
from disagg.scheduling.step.scheduler import StepScheduler

EPOCH = Epoch(1)


def arrived(number: int, num_tokens: int = 20, max_total_tokens: int = 200) -> Arrived:
    name = RequestId(f"r{number}")
    return Arrived(request_id=name, epoch=EPOCH, num_tokens=num_tokens, max_total_tokens=max_total_tokens)


def done(step_id: int, *finished: int) -> StepDone:
    results = tuple(StepResult(RequestId(f"r{number}"), FinishReason.LENGTH) for number in finished)
    return StepDone(step_id=step_id, results=results)


def decoding(*numbers: int, num_blocks: int = 64) -> tuple[StepScheduler, RunStep]:
    """Return an instance, and its step, in which these sequences have their first token and decode."""
    scheduler = StepScheduler(SchedulerSettings(), num_blocks, 16)
    first = step_of(scheduler.handle([arrived(number) for number in numbers], 0.0))
    return scheduler, step_of(scheduler.handle([done(first.step_id)], 1.0))


def step_of(actions: list[AnyAction]) -> RunStep:
    (step,) = (action for action in actions if isinstance(action, RunStep))
    return step


def told(actions: list[AnyAction]) -> list[str]:
    return [name for action in actions if isinstance(action, Emit) for name in action.request_ids]


def test_a_step_that_was_repeated_goes_on_with_those_that_stay() -> None:
    scheduler, _ = decoding(0, 1, 2)
    step, fresh = scheduler.repeat(12, {})
    assert (step.step_id, fresh) == (14, ["r0", "r1", "r2"])
    actions = scheduler.handle([done(step.step_id, 1)], 2.0)
    assert told(actions) == ["r1"]
    assert step_of(actions) == RunStep(step_id=15, chunks=(), num_standing=2)
    assert scheduler.num_held_blocks == 2 * 3  # for 34 tokens each
    assert scheduler.load().num_decode_tokens_total == 3 * 13


@pytest.mark.parametrize("event", [arrived(7), Cancelled(request_id=RequestId("r0"), epoch=EPOCH)])
def test_what_changes_the_batch_otherwise_brings_a_step_like_any_other(event: AnyEvent) -> None:
    scheduler, _ = decoding(0, 1, 2)
    step, _ = scheduler.repeat(10, {})
    actions = scheduler.handle([done(step.step_id), event], 2.0)
    step = step_of(actions)
    assert not step.num_standing
    assert {chunk.start for chunk in step.chunks if chunk.num_tokens == 1} == {20 + 11}


@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=8), num_blocks=st.integers(13, 40), data=st.data())
@settings(max_examples=100, deadline=None)
def test_repeating_is_what_single_steps_do(counts: list[int], num_blocks: int, data: Any) -> None:
    ahead, step_ahead = decoding(0, 1, 2, num_blocks=num_blocks)
    single, step = decoding(0, 1, 2, num_blocks=num_blocks)
    assert step_ahead == step
    left, now = [0, 1, 2], 1.0
    for count in counts:
        if ahead.num_repeats() < count + 1 or not left:
            break
        finished = data.draw(st.lists(st.sampled_from(left), max_size=1))
        now += 1
        step_ahead, _ = ahead.repeat(count, {})
        for _ in range(count):
            step = step_of(single.handle([done(step.step_id)], now))
        actions = single.handle([done(step.step_id, *finished)], now)
        left = [number for number in left if number not in finished]
        ahead_actions = ahead.handle([done(step_ahead.step_id, *finished)], now)
        assert ahead.audit() == single.audit()
        assert ahead.load() == single.load()
        ahead.validate()
        if not left:
            break
        step, step_ahead = step_of(actions), step_of(ahead_actions)
        assert step_ahead.step_id == step.step_id
        assert step_ahead.num_standing + len(step_ahead.chunks) == len(step.chunks)
