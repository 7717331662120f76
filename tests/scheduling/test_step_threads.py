"""How many cores of others a step may use, and what it would have taken without."""

import pytest

from disagg.base.config import SchedulerSettings
from disagg.base.ids import Epoch, RequestId
from disagg.costs.latency import StepShape
from disagg.costs.step_times import StepTimes
from disagg.scheduling.step.actions import Chunk, RunStep
from disagg.scheduling.step.events import Arrived, StepDone, StepResult
from disagg.scheduling.step.scheduler import StepScheduler
from disagg.scheduling.step.threads import StepThreads


def chunk(num_tokens: int) -> Chunk:
    return Chunk(RequestId("a"), 0, num_tokens, (), samples=True)


@pytest.mark.parametrize("num_tokens", [[512], [1, 1, 512], [1]], ids=["prefill", "both", "decode"])
def test_steps_borrow_what_there_is(num_tokens: list[int]) -> None:
    chunks = [chunk(number) for number in num_tokens]
    assert StepThreads(1, num_borrowable=2).num_borrowed(chunks) == 2
    assert StepThreads(1).num_borrowed(chunks) == 0


def test_a_borrowed_core_spares_prefill_more_than_decodes() -> None:
    threads = StepThreads(1, num_borrowable=1)
    prefill, decode = StepShape(num_prefills=1, num_prefill_tokens=512), StepShape(num_decodes=1)
    assert threads.alone_s(prefill, 0.1, 0.1) > threads.alone_s(decode, 0.1, 0.1) > 0.1
    assert threads.alone_s(decode, 0.1, 0.0) == 0.1


def test_a_scheduler_learns_what_a_step_takes_on_own_cores() -> None:
    times = StepTimes()
    threads = StepThreads(num_own=1, num_borrowable=1)
    scheduler = StepScheduler(SchedulerSettings(), 64, 16, times=times, threads=threads)
    arrived = Arrived(request_id=RequestId("a"), epoch=Epoch(0), num_tokens=100, max_total_tokens=102)
    (step,) = scheduler.handle([arrived], 0.0)
    assert isinstance(step, RunStep)
    assert step.num_borrowed == 1
    done = StepDone(step_id=step.step_id, results=(StepResult(RequestId("a"), None),), duration_s=0.10, borrowed_s=0.08)
    _, step = scheduler.handle([done], 0.1)
    assert isinstance(step, RunStep)
    assert times.measured_s == pytest.approx(0.10 + 0.9 * 0.08)
    assert scheduler.load().borrowed_core_seconds_total == pytest.approx(0.08)
