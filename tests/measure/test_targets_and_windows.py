"""Targets: objectives, the part of requests that keeps them, tails. Windows: as much of a trace as is wanted."""

import math

import pytest

from disagg.base.errors import ConfigurationError
from disagg.measure.arrivals import Arrivals
from disagg.measure.open_loop import OpenLoop
from disagg.measure.slo import Slo, Tail, parse_target
from disagg.measure.statistics import Percentiles
from disagg.measure.windows import TraceWindow, with_requests
from disagg.measure.workload import PrefixBlocks, RequestSpec

ROWS = tuple(RequestSpec(100 + n, 10, arrival_s=float(n), prefix=PrefixBlocks((n,)), line=n + 1) for n in range(5))


def window(num_requests: int) -> TraceWindow:
    return TraceWindow("five", ROWS, 1.0, num_requests)


def test_a_target_says_how_many_and_how_late() -> None:
    target = parse_target("ttft=250ms, tpot=100ms@95%, ttft.p99<=2s")
    assert target.slo == Slo(ttft_s=0.25, tpot_s=0.1)
    assert target.attainment == 0.95
    assert target.tails == (Tail(latency="ttft", percentile="p99", limit_s=2.0),)
    assert str(target) == "ttft=250ms,tpot=100ms@95%,ttft.p99<=2000ms"
    assert parse_target(str(target)) == target


def test_a_target_needs_no_objective_for_each_request() -> None:
    target = parse_target("itl.p99<=80ms")
    assert (target.slo, target.attainment) == (Slo(), 0.9)


def test_a_tail_is_kept_or_not() -> None:
    target = parse_target("ttft=1s,ttft.p99<=2s")
    near, far = (Percentiles(mean=1, p50=1, p90=1, p99=p99) for p99 in (2.0, 2.1))
    assert target.is_met(0.9, {"ttft": near})
    assert not target.is_met(0.9, {"ttft": far})
    assert not target.is_met(0.89, {"ttft": near})
    assert target.is_met(1.0, {"ttft": Percentiles.of([math.nan])})


def test_what_was_missed_is_told_with_the_figures() -> None:
    target = parse_target("ttft=1s@99.9%,ttft.p99<=2s")
    near, far = (Percentiles.of([value]) for value in (1.0, 2.5))
    assert target.missed(999 / 1000, {"ttft": near}) == ()
    assert target.missed(998 / 1000, {"ttft": far}) == ("attainment 99.8%, not 99.9%", "ttft.p99 2500ms, not <=2000ms")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ttft=1s@90%,tpot=1s@95%", "twice"),
        ("ttft=1s@0%", "above 0%"),
        ("ttft=1s@101%", "at most 100%"),
        ("ttft.p95<=1s", "no p95"),
        ("tttf.p99<=1s", "no latency is called 'tttf'"),
        ("ttft.p99<=1h", "no unit is called 'h'"),
        ("ttft=1s,ttft=2s", "pair of objectives"),
    ],
)
def test_a_wrong_target_is_told(text: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        parse_target(text)


def test_a_window_begins_anywhere_and_goes_round() -> None:
    rows = list(window(12).rows(seed=3))
    assert len(rows) == 12
    lengths = [row.prompt_len for row in rows]
    assert lengths[:5] == lengths[5:10]
    assert len({row.prefix.ids for row in rows}) == 12, "a row that comes again shares no prefix with itself"
    assert [row.line for row in rows] == [0] * 12


def test_a_window_has_the_rate_of_all_rows() -> None:
    rows = list(window(12).rows(seed=0))
    assert rows[0].arrival_s == 0
    assert 11 / rows[-1].arrival_s == pytest.approx(1.0)
    faster = with_requests(OpenLoop(window(5), Arrivals()), 9).at_rate(2.0)
    drawn = list(faster.draw(0))
    assert len(drawn) == 9
    assert 8 / drawn[-1].arrival_s == pytest.approx(2.0)


def test_equal_seeds_give_equal_windows() -> None:
    assert list(window(4).rows(1)) == list(window(4).rows(1))
    assert {next(window(4).rows(seed)).prompt_len for seed in range(20)} == {100, 101, 102, 103, 104}
