"""A run of equal decode steps that was interrupted, and goes on where that changed nothing."""

import pytest

from disagg.base.ids import RequestId
from disagg.costs.latency import ConstantLatency, StepShape
from disagg.scheduling.step.actions import Chunk, RunStep
from disagg.simulator.decode_run import DecodeRun

LATENCY = ConstantLatency(0.1)
NEWCOMER = Chunk(RequestId("new"), 10, 1, (), samples=True)
AGAIN = RunStep(step_id=4, chunks=(), num_standing=2)


def interrupted() -> DecodeRun:
    """Return a run of a step and 20 repetitions, of which three have ended when something came."""
    run = DecodeRun(RunStep(step_id=1, chunks=()), StepShape(num_decodes=2), LATENCY, 0.0, 20)
    run.is_interrupted = True
    run.take(3)
    return run


def test_it_goes_on_with_what_was_timed() -> None:
    run = interrupted()
    ends_s = list(run.ends_s)
    assert run.goes_on(AGAIN, LATENCY, 17, run.started_s)
    assert (run.step, run.ends_s, run.is_interrupted) == (AGAIN, ends_s, False)


@pytest.mark.parametrize(
    ("step", "latency", "num_repeats"),
    [
        (RunStep(step_id=4, chunks=(NEWCOMER,), num_standing=2), LATENCY, 17),
        (RunStep(step_id=4, chunks=(NEWCOMER, NEWCOMER)), LATENCY, 17),
        (AGAIN, ConstantLatency(0.2), 17),
        (AGAIN, LATENCY, 5),
    ],
    ids=["somebody came", "another batch", "another pace", "blocks run short"],
)
def test_it_does_not_where_something_has_changed(step: RunStep, latency: ConstantLatency, num_repeats: int) -> None:
    run = interrupted()
    assert not run.goes_on(step, latency, num_repeats, run.started_s)
    assert not interrupted().goes_on(AGAIN, LATENCY, 17, run.started_s + 1.0)
