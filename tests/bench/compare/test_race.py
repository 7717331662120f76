"""The race with systems that are formulas: what it runs, what it concludes, what it costs."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import pytest

from disagg.bench.compare.race import ByFlood, ByRates, Heat, Race, RunHeat, Standing, served_rate
from disagg.measure.statistics import Share

NUM_REQUESTS = 30


class Systems:
    """Each keeps rates up to its goodput with the requests of a seed; flooded, it serves as much."""

    def __init__(self, *goodputs: Mapping[int, float] | float, slow_answers: Sequence[int] = ()) -> None:
        self.goodputs = goodputs
        self.slow_answers = slow_answers
        """Which miss their TPOT when flooded."""
        self.runs: list[tuple[int, float, int]] = []
        self.num_starts = 0

    def goodput(self, number: int, seed: int) -> float:
        known = self.goodputs[number]
        return known if isinstance(known, float) else known[seed]

    @contextmanager
    def open(self, number: int) -> Iterator[RunHeat]:
        self.num_starts += 1

        def run_heat(rate: float, seed: int, *, deadline_s: float = math.inf, gives_up: bool = True) -> Heat:
            self.runs.append((number, rate, seed))
            goodput = self.goodput(number, seed)
            return Heat(
                rate=rate,
                seed=seed,
                attainment=Share.of(NUM_REQUESTS if rate <= goodput else 0, NUM_REQUESTS),
                ttft_p90_s=rate,
                tpot_p90_s=rate,
                is_met=rate <= goodput,
                keeps_tpot=number not in self.slow_answers,
                served_rate=goodput,
                is_cut=NUM_REQUESTS / goodput > deadline_s or (gives_up and rate > goodput),
            )

        yield run_heat

    def race(self, *, floods: bool = False, seeds: int = 3, has_time: Callable[[], bool] = lambda: True) -> Race:
        judges = (ByFlood(rate=10.0, num_requests=NUM_REQUESTS), ByRates(start_rate=1.0))
        return Race(len(self.goodputs), self.open, judges if floods else judges[1:], tuple(range(seeds)), has_time)

    def standings(self, *, floods: bool = False, seeds: int = 3) -> list[Standing | None]:
        return [one.standing for one in self.race(floods=floods, seeds=seeds).run()]

    def num_runs(self, number: int) -> int:
        return sum(run[0] == number for run in self.runs)


@pytest.mark.parametrize("floods", [False, True])
def test_rivals_that_are_no_better_cost_one_run(floods: bool) -> None:
    systems = Systems(1.02, 1.02, 0.5, 1.04)
    assert systems.standings(floods=floods) == [None, Standing.BEHIND, Standing.BEHIND, Standing.BEHIND]
    assert [systems.num_runs(number) for number in (1, 2, 3)] == [1, 1, 1]
    assert systems.num_runs(0) <= (1 if floods else 4)
    assert systems.num_starts == 4


@pytest.mark.parametrize("floods", [False, True])
def test_a_better_rival_is_tried_with_every_seed(floods: bool) -> None:
    systems = Systems(1.0, 1.5, 0.9)
    assert systems.standings(floods=floods) == [None, Standing.AHEAD, Standing.BEHIND]
    assert {seed for number, _, seed in systems.runs if number == 1} == {0, 1, 2}
    assert {seed for number, _, seed in systems.runs if number == 2} == {0}


@pytest.mark.parametrize(
    ("goodputs", "standing"),
    [
        ({0: 1.5, 1: 0.9, 2: 1.5}, Standing.TIED),
        ({0: 1.5, 1: 0.9, 2: 0.9}, Standing.BEHIND),
    ],
)
def test_seeds_that_disagree_are_noise(goodputs: dict[int, float], standing: Standing) -> None:
    assert Systems(1.0, goodputs).standings() == [None, standing]


def test_a_search_closes_in_on_the_goodput() -> None:
    first, rival = Systems(1.33, 1.93).race(seeds=1).run()
    assert first.found[0].rate <= 1.33 < first.found[0].missed <= first.found[0].rate * 1.0527
    assert rival.found[0].rate <= 1.93 < rival.found[0].missed <= rival.found[0].rate * 1.1
    assert len(first.heats) + len(rival.heats) <= 12


def test_a_first_that_serves_nothing_is_beaten_by_what_serves_the_least() -> None:
    systems = Systems(1e-9, 1.0)
    _, rival = systems.race(seeds=1).run()
    assert rival.standing is Standing.AHEAD


def test_a_flood_that_answers_too_slowly_tells_nothing_of_the_first() -> None:
    systems = Systems(1.0, 0.9, slow_answers=[0])
    first, rival = systems.race(floods=True).run()
    assert first.found[0].rate == 1.0
    assert rival.standing is Standing.BEHIND
    assert rival.heats[0].rate == pytest.approx(1.0 / 0.95)


def test_a_quicker_rival_whose_answers_are_slow_is_tried_at_a_rate_as_well() -> None:
    systems = Systems(1.0, 1.5, slow_answers=[1])
    assert systems.standings(floods=True, seeds=1) == [None, Standing.AHEAD]
    assert [rate for number, rate, _ in systems.runs if number == 1] == [10.0, pytest.approx(1.0 / 0.95)]


def test_rivals_without_time_are_told() -> None:
    left = iter((True, False))
    systems = Systems(1.0, 0.5, 2.0)
    standings = [one.standing for one in systems.race(has_time=lambda: next(left)).run()]
    assert standings == [None, Standing.BEHIND, Standing.UNKNOWN]


def test_a_better_rival_without_time_for_seeds_stays_better() -> None:
    left = iter((True, False, False))
    systems = Systems(1.0, 2.0)
    _, rival = systems.race(has_time=lambda: next(left)).run()
    assert rival.standing is Standing.AHEAD
    assert len(rival.found) == 1


def test_what_is_served_leaves_the_last_tenth_out() -> None:
    assert served_rate([*range(1, 10), 100], 10, 100.0) == 1.0
    assert served_rate([1.0, 2.0], 10, 4.0) == 0.5
    assert served_rate([], 10, 0.0) == 0.0
