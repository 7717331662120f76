"""Virtual time: one total order."""

import itertools
import math
import random

import pytest

from disagg.base.errors import InternalError
from disagg.simulator.event_queue import EventQueue


def test_turns_come_after_all_that_happens_at_their_time() -> None:
    queue = EventQueue()
    seen: list[str] = []

    def happen() -> None:
        seen.append("happening")
        queue.push_turn(lambda: seen.append("turn, pushed first"))
        queue.push_turn(lambda: seen.append("turn, pushed second"))
        queue.push(1.0, lambda: seen.append("caused by it, at once"))
        assert len(queue) == 5

    queue.push(2.0, lambda: seen.append("late"))
    queue.push(1.0, happen)
    queue.push(1.0, lambda: seen.append("happening as well"))
    queue.run()
    assert seen == [
        "happening",
        "happening as well",
        "caused by it, at once",
        "turn, pushed first",
        "turn, pushed second",
        "late",
    ]


def test_the_order_does_not_depend_on_what_else_is_in_the_heap() -> None:
    rng = random.Random(1)
    times = [rng.choice((0.5, 1.0, 1.5)) for _ in range(200)]
    queue = EventQueue()
    seen: list[tuple[float, int]] = []
    for number, time_s in enumerate(times):
        queue.push(time_s, lambda entry=(time_s, number): seen.append(entry))
    queue.run()
    assert seen == sorted((time_s, number) for number, time_s in enumerate(times))


def test_time_is_that_of_the_running_call_and_never_goes_back() -> None:
    queue = EventQueue()
    seen: list[float] = []
    queue.push(1.0, lambda: queue.push(queue.now() + 0.5, lambda: seen.append(queue.now())))
    queue.push(3.0, lambda: seen.append(queue.now()))
    queue.run()
    assert seen == [1.5, 3.0]
    assert all(before <= after for before, after in itertools.pairwise(seen))


def test_what_is_due_later_waits_for_the_next_run() -> None:
    queue = EventQueue()
    seen: list[str] = []
    queue.push(1.0, lambda: seen.append("a"))
    queue.push(2.0, lambda: seen.append("b"))
    queue.run(until_s=1.5)
    assert (seen, len(queue)) == (["a"], 1)
    queue.run()
    assert seen == ["a", "b"]


@pytest.mark.parametrize("time_s", [0.5, math.nan])
def test_the_past_and_no_time_at_all_are_refused(time_s: float) -> None:
    queue = EventQueue()
    queue.push(1.0, lambda: queue.push(time_s, lambda: None))
    with pytest.raises(InternalError, match="was pushed"):
        queue.run()
