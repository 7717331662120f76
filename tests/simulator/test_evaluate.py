"""A deployment under a workload: runs over seeds, and the rate up to which it keeps its objectives."""

import math
from dataclasses import replace

import pytest
from simulated import pair, poisson

from disagg.base.errors import ConfigurationError
from disagg.measure.arrivals import ArrivalKind, Arrivals
from disagg.measure.open_loop import FixedLengths, OpenLoop
from disagg.measure.slo import Slo, SloTarget, Tail
from disagg.simulator.evaluate import evaluate, highest_rate, run_workload, search_goodput
from disagg.simulator.simulation import simulate

SLO = Slo(ttft_s=0.015, tpot_s=0.005)
WORKLOAD = OpenLoop(FixedLengths(200, 60, 150), Arrivals(ArrivalKind.POISSON, 5.0))


def test_there_is_a_run_for_each_seed_of_a_workload_that_is_drawn() -> None:
    found = evaluate(pair(), WORKLOAD, SLO, num_seeds=3)
    assert found.runs == tuple(run_workload(pair(), WORKLOAD, SLO, seed) for seed in range(3))
    assert len({run.span_s for run in found.runs}) == 3
    assert found.attainment.mean == pytest.approx(sum(run.attainment for run in found.runs) / 3)
    assert (found.num_devices, found.rate, found.slo) == (2, 5.0, SLO)


def test_a_workload_with_its_own_times_runs_once() -> None:
    class Rows(FixedLengths):
        rate = 4.0

        def rows(self, seed: int):
            return (replace(row, arrival_s=number / 4) for number, row in enumerate(super().rows(seed)))

    replayed = OpenLoop(Rows(200, 60, 20), Arrivals(ArrivalKind.REPLAY))
    assert len(evaluate(pair(), replayed, SLO, num_seeds=3).runs) == 1


def test_devices_are_counted_with_the_parallelism() -> None:
    both = pair()
    wide = replace(both, instances=(*both.instances, replace(both.instances[1], name="decode-1", num_devices=4)))
    assert evaluate(wide, WORKLOAD, SLO).num_devices == 6


def test_the_goodput_is_a_rate_that_keeps_the_target_and_near_one_that_does_not() -> None:
    goodput = search_goodput(pair(), WORKLOAD, SloTarget(slo=SLO), num_seeds=2)
    assert evaluate(pair(), WORKLOAD.at_rate(goodput), SLO, num_seeds=2).attainment.mean >= 0.9
    assert evaluate(pair(), WORKLOAD.at_rate(1.1 * goodput), SLO, num_seeds=2).attainment.mean < 0.9


def test_a_limit_on_a_percentile_lowers_the_goodput() -> None:
    few = replace(WORKLOAD, source=FixedLengths(200, 20, 40))
    loose = search_goodput(pair(), few, SloTarget(slo=SLO))
    p99_s = evaluate(pair(), few.at_rate(loose), SLO).runs[0].ttft.p99
    tails = SloTarget(slo=SLO, tails=(Tail(latency="ttft", percentile="p99", limit_s=0.8 * p99_s),))
    tight = search_goodput(pair(), few, tails)
    assert tight < loose
    assert not evaluate(pair(), few.at_rate(tight), SLO).missed(tails)
    (words,) = evaluate(pair(), few.at_rate(loose), SLO).missed(tails)
    assert words.startswith("ttft.p99 ")


@pytest.mark.parametrize("start", [0.1, 1.0, 7.3, 400.0])
def test_the_goodput_is_found_from_anywhere(start: float) -> None:
    found = highest_rate(lambda rate: 1 / (1 + math.exp(rate - 12)) >= 0.9, start, "90%")
    assert found == pytest.approx(12 - math.log(9), rel=0.03)


def test_no_goodput_is_said_so() -> None:
    with pytest.raises(ConfigurationError, match="missed at any rate"):
        highest_rate(lambda rate: False, 1.0, "90%")
    with pytest.raises(ConfigurationError, match="met at any rate"):
        highest_rate(lambda rate: True, 1.0, "90%")


def test_the_goodput_of_a_pair_is_where_its_attainment_falls() -> None:
    slo = Slo(ttft_s=0.015, tpot_s=0.005)

    def attainment(rate: float) -> float:
        return simulate(pair(), poisson(rate, 150, seed=3), slo).attainment

    goodput = highest_rate(lambda rate: attainment(rate) >= 0.9, 5, "90%")
    assert attainment(goodput) >= 0.9
    assert attainment(1.1 * goodput) < 0.9
