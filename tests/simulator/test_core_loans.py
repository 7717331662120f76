"""Which cores of a host are lent to whom: by the rules of the live board."""

from hypothesis import given, settings
from hypothesis import strategies as st

from disagg.base.ids import InstanceId
from disagg.scheduling.host_cores import cores_to_borrow
from disagg.simulator.core_loans import CoreLoans

A, B, C = InstanceId("a"), InstanceId("b"), InstanceId("c")


def host_of(*cores: tuple[int, ...]) -> CoreLoans:
    """Instances a, b, ... on these cores."""
    loans = CoreLoans()
    for name, own, others in zip((A, B, C), cores, cores_to_borrow(cores), strict=False):
        loans.join(name, own, others)
    return loans


def test_a_core_is_borrowed_while_its_owner_has_no_step() -> None:
    loans = host_of((0,), (1,))
    assert loans.begin(A, 1) == []
    assert loans.num_borrowed(A) == 1
    assert loans.begin(B, 1) == [A]
    assert (loans.num_borrowed(A), loans.num_borrowed(B)) == (0, 0)
    assert loans.end(B) == []  # between two steps a core stays its owner's
    assert loans.lend(B) == [A]
    assert loans.num_borrowed(A) == 1


def test_a_step_that_may_not_borrow_does_not() -> None:
    loans = host_of((0,), (1,))
    loans.begin(A, 0)
    assert loans.num_borrowed(A) == 0


def test_a_core_is_borrowed_by_one_at_a_time_and_then_by_the_next() -> None:
    loans = host_of((0, 1), (2,), (3,))
    loans.begin(A, 2)
    assert loans.num_borrowed(A) == 2
    loans.begin(B, 1)  # takes its own back, and waits for that of c
    assert (loans.num_borrowed(A), loans.num_borrowed(B)) == (1, 0)
    assert loans.is_waited_for(A)
    assert not loans.is_waited_for(B)
    assert loans.rivals(B) == [A]
    assert loans.end(A) == [B]
    assert loans.num_borrowed(B) == 1
    loans.begin(A, 2)
    assert loans.begin(C, 1) == [B]


NAMES = st.sampled_from([A, B, C])
CALLS = st.lists(st.tuples(st.sampled_from(["begin", "end", "lend"]), NAMES), max_size=60)


@settings(max_examples=200, deadline=None)
@given(CALLS, st.sampled_from([((0,), (1,), (2,)), ((0, 1), (2,), (3,)), ((0, 1, 2), (3,), (4, 5))]))
def test_changes_are_told_and_no_core_computes_two_steps(
    calls: list[tuple[str, InstanceId]], cores: tuple[tuple[int, ...], ...]
) -> None:
    loans = host_of(*cores)
    own = dict(zip((A, B, C), cores, strict=True))
    has_step, needs_own = set[InstanceId](), set[InstanceId]()
    for what, name in calls:
        before = {one: loans.num_borrowed(one) for one in own}
        if what == "begin" and name not in has_step:
            changed = loans.begin(name, len(own[name]))
            has_step.add(name)
            needs_own.add(name)
        elif what == "end" and name in has_step:
            changed = loans.end(name)
            has_step.remove(name)
        elif what == "lend" and name not in has_step:
            changed = loans.lend(name)
            needs_own.discard(name)
        else:
            continue
        after = {one: loans.num_borrowed(one) for one in own}
        assert {one for one in own if before[one] != after[one]} - {name} == set(changed) - {name}
        lent = sum(len(own[one]) for one in own if one not in needs_own)
        assert sum(after.values()) <= lent
        assert all(after[one] == 0 for one in own if one not in has_step)
