"""The rule of autoscaling: what it adds, what it removes, and that it leaves a stationary load alone."""

import math
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg.base.elastic_settings import InstanceRange, parse_autoscale
from disagg.base.errors import ConfigurationError
from disagg.base.messages import StepCosts
from disagg.base.objectives import Objectives
from disagg.base.request import Role
from disagg.scheduling.router.demand import Demand, erlang_c
from disagg.scheduling.router.scaling import CALM_S, COOL_DOWN_S, LOW_S, MOST_CALM_S, Attainment, ScalingPolicy

SLO = Objectives(ttft_s=0.5, tpot_s=0.05)
COSTS = StepCosts(step_s=0.01, token_s=2e-4, square_s=0.0, prefill_s=0.0, context_s=1e-7, decode_s=5e-4)


def needs(number: float) -> Attainment:
    """All is kept by so many instances, and by fewer a part."""
    return lambda count: min(1.0, count / number) ** 4


def course(policy: ScalingPolicy, count: int, loads: list[float], start_s: float = 0.0) -> list[int]:
    """The number of instances at each second; a change comes true at once."""
    counts = []
    for second, load in enumerate(loads):
        count = policy.review(count, needs(load), start_s + second)
        counts.append(count)
    return counts


def test_too_few_for_a_while_is_one_more_and_a_moment_is_not():
    counts = course(ScalingPolicy(InstanceRange(1, 4)), 1, [2.0] * 10)
    assert counts[: math.ceil(LOW_S)] == [1] * math.ceil(LOW_S)
    assert counts[-1] == 2
    assert course(ScalingPolicy(InstanceRange(1, 4)), 1, [2.0, 2.0, 0.5] * 20) == [1] * 60


def test_as_many_are_added_at_once_as_are_needed_and_as_the_range_allows():
    assert course(ScalingPolicy(InstanceRange(1, 8)), 1, [5.0] * 10)[-1] == 5
    assert course(ScalingPolicy(InstanceRange(1, 3)), 1, [5.0] * 10)[-1] == 3


def test_one_fewer_only_after_a_long_calm_and_one_at_a_time():
    counts = course(ScalingPolicy(InstanceRange(1, 4)), 4, [0.5] * 400)
    changes = [second for second in range(1, 400) if counts[second] != counts[second - 1]]
    assert changes[0] >= CALM_S
    assert all(later - earlier >= CALM_S for earlier, later in pairwise(changes))
    assert counts[-1] == 1


def test_nothing_is_decided_while_a_change_comes_true_and_some_time_after():
    policy = ScalingPolicy(InstanceRange(1, 4))
    for second in range(20):
        assert policy.review(1, needs(3.0), float(second), is_settled=False) == 1
    assert policy.review(1, needs(3.0), 19 + COOL_DOWN_S - 0.1) == 1
    assert policy.review(1, needs(3.0), 19 + COOL_DOWN_S) == 3


def test_the_range_holds_though_nothing_can_be_predicted():
    assert ScalingPolicy(InstanceRange(2, 4)).review(1, None, 0.0) == 2
    assert ScalingPolicy(InstanceRange(2, 4)).review(6, None, 0.0) == 4
    assert ScalingPolicy(InstanceRange(2, 4)).review(3, None, 0.0) == 3


@given(load=st.floats(0.3, 6.0), noise=st.floats(0.0, 0.25), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_a_stationary_load_seen_through_noise_does_not_flap(load: float, noise: float, seed: int):
    rng = random.Random(seed)
    loads = [load * (1 + rng.uniform(-noise, noise)) for _ in range(6 * 3600)]
    counts = course(ScalingPolicy(InstanceRange(1, 8)), 8, loads)
    settled = counts[3600:]
    changes = sum(a != b for a, b in pairwise(settled))
    assert changes <= 4, f"{changes} changes in five hours of equal load"


@given(loads=st.lists(st.tuples(st.floats(0.1, 8.0), st.integers(1, 300)), min_size=1, max_size=40))
@settings(max_examples=40, deadline=None)
def test_whatever_the_load_changes_keep_their_distance_and_the_range(loads: list[tuple[float, int]]):
    policy = ScalingPolicy(InstanceRange(2, 6))
    counts = course(policy, 3, [load for load, seconds in loads for _ in range(seconds)])
    assert all(2 <= count <= 6 for count in counts)
    changes = [second for second in range(1, len(counts)) if counts[second] != counts[second - 1]]
    assert all(later - earlier >= COOL_DOWN_S for earlier, later in pairwise(changes))
    assert policy.calm_s <= MOST_CALM_S


def test_more_instances_are_never_predicted_to_keep_less():
    demand = Demand(
        prompt_rate=6.0, prompts_s=(0.1, 0.2, 0.3), answer_rate=6.0, answer_tokens=100, context_tokens=500,
        decode_costs=COSTS,
    )  # fmt: skip
    kept = [demand.attainment(count, SLO) for count in range(1, 9)]
    assert kept == sorted(kept)
    assert kept[0] == 0.0, "prompts alone take 1.2 s in a second"
    assert kept[-1] > 0.9


def test_what_no_number_of_instances_could_keep_is_not_asked_of_them():
    slow = Demand(prompt_rate=0.1, prompts_s=(0.1, 2.0))
    assert slow.best_attainment(SLO) == pytest.approx(0.5, abs=0.01)


def test_erlang_c_of_one_server_is_its_load_and_more_servers_wait_less():
    assert erlang_c(1, 0.7) == pytest.approx(0.7)
    assert erlang_c(2, 0.5) == pytest.approx(1 / 3)
    assert erlang_c(8, 0.7) < erlang_c(2, 0.7)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prefill=3..1", "3..1 prefill"),
        ("prefil=1..3", "did you mean prefill"),
        ("prefill=1-3", "such as prefill=1..3"),
        ("decode=0..2", "0..2 decode"),
        ("decode=1..2,decode=1..3", "twice"),
    ],
)
def test_a_range_that_cannot_be_is_refused_in_words(text: str, words: str):
    with pytest.raises(ConfigurationError, match="--autoscale") as refused:
        parse_autoscale(text)
    assert words in str(refused.value).lower()


def test_ranges_are_read():
    assert parse_autoscale("prefill=1..3, decode=2..2") == {
        Role.PREFILL: InstanceRange(1, 3),
        Role.DECODE: InstanceRange(2, 2),
    }
