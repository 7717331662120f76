"""Sharing out cores."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg.scheduling.host_cores import are_lent, assign_cores, cores_to_borrow


@pytest.mark.parametrize(
    ("cores", "wanted", "expected"),
    [
        ([0, 1], [None, None], [(0,), (1,)]),
        ([0, 1, 2], [None, None], [(0, 1), (2,)]),  # the first, a prefill instance, gets what is left over
        ([4, 5, 6, 7], [None], [(4, 5, 6, 7)]),
        ([0, 1, 2, 3], [3, None], [(0, 1, 2), (3,)]),
        ([0, 1, 2, 3], [1, 1], [(0,), (1,)]),
        ([0, 1], [None, None, None], [(0,), (1,), (0,)]),
        ([0, 1], [2, None], [(0, 1), (0,)]),
        ([0, 1], [8], [(0, 1)]),
    ],
)
def test_examples(cores, wanted, expected):
    assert assign_cores(cores, wanted) == expected


@given(
    cores=st.lists(st.integers(0, 200), min_size=1, max_size=40, unique=True),
    wanted=st.lists(st.none() | st.integers(1, 12), min_size=1, max_size=12),
)
def test_everybody_gets_cores_and_nobody_shares_without_need(cores, wanted):
    assigned = assign_cores(cores, wanted)
    assert len(assigned) == len(wanted)
    assert all(own and set(own) <= set(cores) for own in assigned)
    if sum(number or 1 for number in wanted) <= len(cores):
        given_out = [core for own in assigned for core in own]
        assert len(given_out) == len(set(given_out))
        assert all(number is None or len(own) == number for own, number in zip(assigned, wanted, strict=True))


@pytest.mark.parametrize(
    ("cores", "expected"),
    [
        ([(0,), (1,)], [(1,), (0,)]),
        ([(0, 1), (2,)], [(2,), (0,)]),  # no more than its own
        ([(0,), (1, 2), (3,)], [(1,), (3, 0), (0,)]),
        ([(0, 1)], [()]),
        ([(0,), (1,), (0,)], [(), (), ()]),  # a core of two instances is nobody's to lend
    ],
)
def test_cores_of_others_that_an_instance_may_borrow(cores, expected):
    assert cores_to_borrow(cores) == expected


@pytest.mark.parametrize(
    ("asked", "placed", "wanted", "expected"),
    [
        (None, None, [None, None], True),
        (None, None, [None, 2], False),  # who gives threads has a reason
        (None, True, [1, 1], True),
        (None, False, [None, None], False),
        (True, False, [1, 1], True),
        (False, True, [None, None], False),
    ],
)
def test_a_flag_decides_whether_cores_are_lent_then_the_placement_then_whether_threads_are_given(
    asked, placed, wanted, expected
):
    assert are_lent(asked, placed, wanted) is expected
