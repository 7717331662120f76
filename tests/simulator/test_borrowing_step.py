"""A step whose pace changes with the cores that it borrows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg.simulator.borrowing_step import BorrowingStep

TIMES_S = {0: 10.0, 1: 5.0, 2: 4.0}


def test_half_of_a_step_at_each_pace_takes_half_of_either_time() -> None:
    step = BorrowingStep(TIMES_S, now=100.0, num_borrowed=1)
    assert step.end_s == 105.0
    step.change(102.5, 0)  # half of it is done
    assert step.end_s == 107.5
    step.finish()
    assert step.borrowed_s == 2.5


def test_a_core_that_comes_late_is_taken_too() -> None:
    step = BorrowingStep(TIMES_S, now=0.0)
    step.change(5.0, 2)
    assert step.end_s == 7.0
    step.finish()
    assert step.borrowed_s == 4.0


def test_no_core_makes_a_step_slower_and_unknown_numbers_count_as_fewer() -> None:
    assert BorrowingStep({0: 10.0, 1: 11.0}, 0.0, 1).end_s == 10.0
    assert BorrowingStep(TIMES_S, 0.0, 7).end_s == 4.0


@given(
    times=st.tuples(*[st.floats(0.001, 10.0)] * 3),
    changes=st.lists(st.tuples(st.floats(0.0, 5.0), st.integers(0, 2)), max_size=12),
    first=st.integers(0, 2),
)
def test_the_work_of_a_step_is_done_once_whatever_its_pace(
    times: tuple[float, float, float], changes: list[tuple[float, int]], first: int
) -> None:
    """Never slower than on its own cores, never faster than on all."""
    times_s = dict(enumerate(times))
    pace_s = {number: min(times_s[0], time_s) for number, time_s in times_s.items()}
    step = BorrowingStep(times_s, 0.0, first)
    now, number, done, borrowed_s = 0.0, first, 0.0, 0.0
    for after_s, then in changes:
        if now + after_s >= step.end_s:
            break
        done += after_s / pace_s[number]
        borrowed_s += after_s * number
        now, number = now + after_s, then
        step.change(now, number)
    done += (step.end_s - now) / pace_s[number]
    assert done == pytest.approx(1.0)
    assert min(pace_s.values()) * (1 - 1e-9) <= step.end_s <= times_s[0] * (1 + 1e-9)
    borrowed_s += (step.end_s - now) * number
    step.finish()
    assert step.borrowed_s == pytest.approx(borrowed_s)
