import math
from dataclasses import replace

import pytest
from simulated_runs import SLO, all_runs, run

from disagg.bench.report.curves import AttainmentCurve, rate_curves, scale_curves
from disagg.bench.report.distributions import cumulative_shares, tail_shares
from disagg.bench.report.report import focus_groups
from disagg.bench.report.report_tables import client_rows, headline, settings_blocks
from disagg.bench.report.runs import Interval, Load, RunGroup, group_runs, pool_shares
from disagg.measure.record import Ending
from disagg.measure.statistics import Share


def test_runs_of_one_system_and_load_are_one_group() -> None:
    groups = group_runs(all_runs(1, 2, seeds=3, count=20))
    assert [(group.system, group.load.rate, len(group.runs)) for group in groups] == [
        ("colocated", 1, 3),
        ("colocated", 2, 3),
        ("disaggregated", 1, 3),
        ("disaggregated", 2, 3),
    ]


def test_a_miss_of_any_kind_counts_against_attainment() -> None:
    good = run("disaggregated", 1.0, count=10)
    lost = replace(good, records=(*good.records[1:], type(good.records[0])(**{**_fields(good), "event_s": ()})))
    assert RunGroup((good,)).attainment().share == 1.0
    assert RunGroup((lost,)).attainment().share == pytest.approx(0.9)


def _fields(run: object) -> dict[str, object]:
    record = run.records[0]  # type: ignore[attr-defined]
    fields = {name: getattr(record, name) for name in record.__struct_fields__}
    return {**fields, "event_tokens": (), "ending": Ending.REFUSED, "error": "HTTP 429"}


def test_looser_objectives_are_kept_more_often() -> None:
    (group,) = group_runs([run("colocated", 3.0)])
    shares = [group.attainment(factor).share for factor in (0.25, 0.5, 1, 2, 4)]
    assert shares == sorted(shares)
    assert shares[0] < shares[-1]


def test_the_interval_takes_in_how_runs_differ() -> None:
    equal = pool_shares([Share.of(45, 50)] * 3)
    unequal = pool_shares([Share.of(50, 50), Share.of(45, 50), Share.of(40, 50)])
    assert equal.share == unequal.share == 0.9
    assert (equal.low, equal.high) == (Share.of(135, 150).low, Share.of(135, 150).high)
    assert unequal.low < equal.low
    assert unequal.high > equal.high


def test_a_curve_tells_where_it_falls_below_the_target() -> None:
    def at(*shares: float) -> AttainmentCurve:
        return AttainmentCurve("a", (1.0, 2.0, 3.0), tuple(Interval(share, share, share) for share in shares))

    assert at(1.0, 0.95, 0.85).last_above(0.9) == pytest.approx(2.5)
    assert at(1.0, 1.0, 1.0).last_above(0.9) is None
    assert math.isnan(at(0.8, 0.7, 0.6).last_above(0.9) or 0.0)
    assert at(0.8, 0.95, 1.0).first_above(0.9) == 2.0
    assert at(0.1, 0.2, 0.3).first_above(0.9) is None


def test_rates_are_per_device_where_systems_differ_in_devices() -> None:
    groups = group_runs(all_runs(1, 2, count=10))
    assert [curve.x for curve in rate_curves(groups, per_device=True)] == [(0.5, 1.0)] * 2
    assert rate_curves(groups[:1], per_device=False) == []


def test_the_scale_curve_passes_through_the_attainment_at_scale_one() -> None:
    (group,) = group_runs([run("colocated", 3.0)])
    (curve,) = scale_curves([group])
    assert curve.attainment[curve.x.index(1.0)] == group.attainment()


def test_the_load_that_is_looked_at_is_the_heaviest_that_somebody_keeps() -> None:
    groups = group_runs(all_runs(1, 3, 12))
    chosen = focus_groups(groups, target=0.9)
    assert {group.load.rate for group in chosen} == {3}
    assert {group.system for group in chosen} == {"colocated", "disaggregated"}
    assert {group.load.rate for group in focus_groups(groups, target=1.01)} == {1}


def test_ratios_are_to_the_first_system_under_the_same_load() -> None:
    groups = group_runs(all_runs(1, 3))
    rows = headline(groups)
    assert [(row.load, row.system, row.is_reference) for row in rows] == [
        ("1 request/s", "colocated", True),
        ("1 request/s", "disaggregated", False),
        ("3 requests/s", "colocated", True),
        ("3 requests/s", "disaggregated", False),
    ]
    assert rows[2].cells[0].note == ""
    times = groups[3].ttft.p50 / groups[1].ttft.p50
    assert rows[3].cells[0].note == f"×{times:.2f}"


def test_a_late_client_is_named() -> None:
    timely = run("colocated", 1.0, count=20)
    late = replace(
        timely,
        records=tuple(
            type(record)(
                **{**{name: getattr(record, name) for name in record.__struct_fields__}, "due_s": record.sent_s - 0.05}
            )
            for record in timely.records
        ),
    )
    assert [row.is_late for row in client_rows([RunGroup((timely,)), RunGroup((late,))])] == [False, True]


def test_a_disturbed_machine_is_named() -> None:
    quiet = replace(run("colocated", 1.0, count=5), other_cores=0.01)
    busy = replace(quiet, other_cores=0.5)
    assert [row.is_disturbed for row in client_rows([RunGroup((quiet,)), RunGroup((quiet, busy))])] == [False, True]


def test_settings_of_all_systems_are_told_once() -> None:
    runs = [replace(one, settings={**one.settings, "Model": "m"}) for one in all_runs(1, seeds=2, count=3)]
    assert settings_blocks(runs) == [
        ("All systems", {"Model": "m", "Devices": "2", "Seeds": "0, 1"}),
        ("colocated", {"Command": "disagg serve --colocated 2"}),
        ("disaggregated", {"Command": "disagg serve --disaggregated 2"}),
    ]
    assert [name for name, _ in settings_blocks(runs[:1])] == ["colocated"]


def test_shares_of_latencies() -> None:
    x, y = cumulative_shares([3.0, 1.0, math.nan, 2.0])
    assert (x.tolist(), y.round(1).tolist()) == ([1.0, 2.0, 3.0], [33.3, 66.7, 100.0])
    x, y = tail_shares([float(n) for n in range(1, 10001)])
    assert (x[0], y[0]) == (1.0, 100.0)
    assert (x[-1], y[-1]) == (10000.0, 0.01)
    assert len(x) <= 300


def test_loads_say_what_they_are() -> None:
    assert [str(Load(rate=1)), str(Load(rate=2.5)), str(Load(num_users=1)), str(Load(num_users=8))] == [
        "1 request/s",
        "2.5 requests/s",
        "one request at a time",
        "8 users",
    ]
    assert str(Load(num_users=1, prompt_len=512)) == "512 prompt tokens"
    assert SLO.tpot_s == 0.05
