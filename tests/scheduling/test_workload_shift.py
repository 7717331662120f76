"""The tests that say that a workload has moved: what they find, and how rarely they cry wolf."""

import random
from collections.abc import Callable

import pytest

from disagg.base.elastic_settings import InstanceRange
from disagg.base.ids import InstanceId
from disagg.base.request import Role
from disagg.scheduling.dispatch.sequence_sample import SequenceSample
from disagg.scheduling.replan.placements import RoleCounts, changes_towards, reachable
from disagg.scheduling.replan.workload_shift import answer_shift, arrival_shift, kolmogorov_smirnov

Gap = Callable[[random.Random], float]


def poisson(rate: float) -> Gap:
    return lambda rng: rng.expovariate(rate)


def bursty(rate: float) -> Gap:
    """Nineteen of twenty gaps are short: a coefficient of variation of about 6."""
    return lambda rng: rng.expovariate(20 * rate) if rng.random() < 0.95 else rng.expovariate(rate / 19)


def sample(seed: int, gap: Gap, *, prompt: float = 1000, answer: float = 200, count: int = 100) -> list[SequenceSample]:
    rng, time_s, found = random.Random(seed), 0.0, []
    for _ in range(count):
        time_s += gap(rng)
        num_prompt, num_answer = (1 + round(rng.expovariate(1 / mean)) for mean in (prompt, answer))
        found.append(SequenceSample(time_s, num_prompt, num_prompt, num_answer, True))
    return found


def test_the_distance_is_that_of_the_textbook():
    assert kolmogorov_smirnov([1, 2, 3, 4], [3, 4, 5, 6]) == 0.5
    assert kolmogorov_smirnov([1, 1, 1], [1, 1]) == 0.0
    assert kolmogorov_smirnov([1, 2], [3, 4]) == 1.0


@pytest.mark.parametrize(("gap", "most"), [(poisson(5), 2), (bursty(5), 20)], ids=["poisson", "bursty"])
def test_equal_workloads_hardly_ever_differ(gap: Gap, most: int):
    """The level is 1 in 10,000 for each of three tests; of strong bursts, a sample holds too few for it to hold."""
    pairs = [(sample(2 * seed, gap), sample(2 * seed + 1, gap)) for seed in range(500)]
    alarms = sum(bool(arrival_shift(*pair) or answer_shift(*pair)) for pair in pairs)
    assert alarms <= most


def test_what_moved_is_told_with_its_figures():
    before = sample(1, poisson(5))
    assert "prompt tokens to compute" in arrival_shift(before, sample(2, poisson(5), prompt=3000))
    assert "requests/s" in arrival_shift(before, sample(3, poisson(20)))
    assert "answer tokens: mean" in answer_shift(before, sample(4, poisson(5), answer=30))


def test_a_burst_alone_is_no_other_rate():
    calm, burst = sample(1, bursty(5)), sample(7, bursty(7))
    assert "requests/s" not in arrival_shift(calm, burst)


def test_placements_within_two_flips_that_can_serve():
    found = reachable(RoleCounts(1, 3), {}, strict_roles=True)
    assert found[0] == RoleCounts(1, 3), "the present one comes first"
    assert set(found[1:]) == {
        RoleCounts(2, 2), RoleCounts(3, 1), RoleCounts(1, 2, 1), RoleCounts(1, 1, 2), RoleCounts(2, 1, 1),
    } | {one for one in found if not one.prefill}  # fmt: skip
    assert all(one.total == 4 for one in found)
    assert all(bool(one.prefill) == bool(one.decode) or one.colocated for one in found)


def test_instances_join_as_far_as_the_ranges_have_room():
    ranges = {Role.PREFILL: InstanceRange(1, 2), Role.DECODE: InstanceRange(1, 1)}
    assert set(reachable(RoleCounts(1, 1), ranges, strict_roles=True)) == {RoleCounts(1, 1), RoleCounts(2, 1)}


def test_the_way_there_flips_those_that_come_first():
    instances = [(InstanceId(f"decode-{number}"), Role.DECODE) for number in (2, 0, 1)]
    instances.append((InstanceId("prefill-0"), Role.PREFILL))
    flips, joins = changes_towards(RoleCounts(3, 1, 1), instances)
    assert [(flip.instance, flip.role) for flip in flips] == [("decode-2", Role.PREFILL), ("decode-0", Role.PREFILL)]
    assert joins == [Role.COLOCATED]
