"""What a simulation reports: attainment, estimates over seeds, the course of a KV pool."""

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated import cluster_spec, instance, pair, poisson, serve

from disagg.base.config import RouterSettings
from disagg.base.errors import ConfigurationError
from disagg.base.ids import RequestId
from disagg.base.request import Role
from disagg.measure.slo import Slo
from disagg.measure.statistics import Estimate
from disagg.simulator.request import SimulatedRequest
from disagg.simulator.simulation import simulate
from disagg.simulator.usage import MAX_POINTS, UsageSeries


def test_attainment_is_joint_and_counts_every_request() -> None:
    requests = poisson(rate=20, count=100, seed=1)
    serve(pair(), requests)
    slo = Slo(
        ttft_s=sorted(request.ttft_s for request in requests)[60],
        tpot_s=sorted(request.tpot_s for request in requests if request.output_len > 1)[50],
    )
    report = simulate(pair(), poisson(rate=20, count=100, seed=1), slo)
    met = [r.ttft_s <= slo.ttft_s and not r.tpot_s > slo.tpot_s for r in requests]
    assert report.attainment == pytest.approx(sum(met) / 100)
    assert report.attainment < min(report.ttft_attainment, report.tpot_attainment)


def test_a_refused_request_is_a_miss() -> None:
    tight = replace(pair(), router=RouterSettings(max_queued_requests=1))
    report = simulate(tight, [SimulatedRequest(RequestId(name), 0.0, 10, 10) for name in "abcd"], Slo())
    assert (report.num_requests, report.num_finished, report.attainment) == (4, 1, 0.25)


def test_stages_add_up_to_all_the_time() -> None:
    report = simulate(pair(), poisson(rate=20, count=50, seed=1), Slo())
    assert sum(report.stage_shares.values()) == pytest.approx(1)
    assert report.stage_shares["decode"] > 0.5


def test_how_full_the_pools_were() -> None:
    # 10 blocks of 16 tokens are held for the whole run but its first and last moments.
    requests = [SimulatedRequest(RequestId("a"), 0.0, 150, 2), SimulatedRequest(RequestId("b"), 0.0, 1, 150)]
    spec = cluster_spec(instance(Role.COLOCATED, num_blocks=20, max_batch_size=1))
    (use,) = simulate(spec, requests, Slo()).kv
    assert (use.instance, use.peak) == ("colocated-0", 0.5)
    assert 0.05 < use.mean < 0.5


def test_a_request_that_can_never_fit_is_refused_by_name() -> None:
    with pytest.raises(
        ConfigurationError,
        match=r"request trace:7 \(9000 \+ 10 tokens\) never fits.*prefill-0: ready, holds 8192 tokens",
    ):
        simulate(pair(), [SimulatedRequest(RequestId("trace:7"), 0.0, 9000, 10)], Slo())


def test_an_estimate_is_a_mean_with_students_interval() -> None:
    assert Estimate.of([0.9, 1.0]).mean == pytest.approx(0.95)
    assert Estimate.of([0.9, 1.0]).half_width == pytest.approx(12.706 * 0.0707107 / math.sqrt(2), rel=1e-4)
    assert math.isnan(Estimate.of([0.5]).half_width)
    rng = random.Random(0)
    covered = 0
    for _ in range(400):
        estimate = Estimate.of([rng.gauss(3, 1) for _ in range(5)])
        covered += abs(estimate.mean - 3) <= estimate.half_width
    assert covered / 400 == pytest.approx(0.95, abs=0.03)


@given(st.lists(st.tuples(st.floats(0, 500), st.integers(0, 50)), max_size=60))
def test_a_usage_series_keeps_mean_and_peak_in_bounded_space(steps: list[tuple[float, int]]) -> None:
    series, now, value, total, highest = UsageSeries(interval_s=0.25), 0.0, 0, 0.0, 0
    for gap_s, new_value in steps:
        total += value * gap_s
        now, value, highest = now + gap_s, new_value, max(highest, new_value)
        series.record(now, value)
    assert series.peak == highest
    assert series.mean(now) == pytest.approx(total / now if now else value)
    assert len(series.peaks) <= MAX_POINTS
