"""The search closes in on the rate at which a target stops being kept."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg.measure.goodput_search import RateBracket, bracket_goodput


@given(limit=st.floats(0.01, 100), start=st.floats(0.1, 10), tolerance=st.floats(0.01, 0.5))
def test_the_goodput_lies_in_a_bracket_as_narrow_as_asked(limit: float, start: float, tolerance: float) -> None:
    asked: list[float] = []

    def meets(rate: float) -> bool:
        asked.append(rate)
        return rate <= limit

    bracket = bracket_goodput(meets, start, tolerance=tolerance)
    assert bracket.met <= limit <= bracket.missed
    assert bracket.missed - bracket.met <= tolerance * bracket.met
    assert len(asked) == len(set(asked))


def test_a_guess_that_is_far_off_is_left_in_growing_steps() -> None:
    asked: list[float] = []
    bracket_goodput(lambda rate: bool(asked.append(rate)) or rate < 0.1, 1.0, tolerance=1.0, growth=1.2)
    steps = [first / second for first, second in itertools.pairwise(asked[:5])]
    assert steps == pytest.approx([1.2, 1.44, 2.0, 2.0])


def test_a_target_that_no_rate_keeps_leaves_the_bracket_open_below() -> None:
    bracket = bracket_goodput(lambda rate: False, 8.0, max_doublings=4)
    assert bracket == RateBracket(0.0, 1.0)
    assert not bracket.is_closed


def test_a_target_that_every_rate_keeps_leaves_the_bracket_open_above() -> None:
    assert bracket_goodput(lambda rate: True, 1.0, max_doublings=4) == RateBracket(8.0, math.inf)
