import math

import msgspec
import pytest

from disagg.bench.compare.ratios import METRICS, LoadComparison, Ratio, compare, geometric_ratio
from disagg.bench.report.runs import Load, SystemRun
from disagg.measure.record import Ending, RequestRecord
from disagg.measure.slo import Slo


def run(system: str, seed: int, ttft_s: float, *, rate: float = 1.0, ending: Ending = Ending.FINISHED) -> SystemRun:
    record = RequestRecord(
        index=0,
        request_id="r",
        prompt_len=10,
        max_output_len=3,
        due_s=0.0,
        sent_s=0.0,
        finished_s=ttft_s + 0.2,
        event_s=(ttft_s, ttft_s + 0.1, ttft_s + 0.2),
        event_tokens=(1, 1, 1),
        ending=ending,
    )
    return SystemRun(
        system=system,
        workload="chat",
        load=Load(rate=rate),
        seed=seed,
        num_devices=2,
        slo=Slo(ttft_s=0.5),
        records=(record,),
        settings={},
    )


def test_a_ratio_is_the_geometric_mean_of_pairs_with_an_interval() -> None:
    ratio = geometric_ratio([2.0, 8.0], [1.0, 1.0])
    assert ratio.mean == pytest.approx(4.0)
    assert ratio.low is not None
    assert ratio.high is not None
    assert ratio.low * ratio.high == pytest.approx(16.0)


def test_equal_ratios_leave_no_doubt() -> None:
    assert geometric_ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == Ratio(
        mean=pytest.approx(2.0), low=pytest.approx(2.0), high=pytest.approx(2.0)
    )


def test_one_pair_has_no_interval_and_no_pair_no_ratio() -> None:
    assert geometric_ratio([3.0], [2.0]) == Ratio(mean=pytest.approx(1.5))
    assert geometric_ratio([math.nan, 0.0], [1.0, 1.0]) == Ratio(mean=None)
    assert geometric_ratio([], []) == Ratio(mean=None)


def test_systems_are_compared_load_by_load_and_repeat_by_repeat() -> None:
    runs = [
        *(run("first", seed, ttft_s) for seed, ttft_s in ((0, 0.1), (1, 0.2))),
        *(run("second", seed, ttft_s) for seed, ttft_s in ((1, 0.4), (0, 0.2))),
        run("first", 0, 0.1, rate=2.0),
        run("second", 0, 0.3, rate=2.0),
    ]
    light, heavy = compare(runs)
    assert (light.load, heavy.load) == ("1 request/s", "2 requests/s")
    assert light.systems == ("first", "second")
    assert [row[0].metric for row in light.values] == [name for name, *_ in METRICS]
    first, second = light.values[0]
    assert (first.mean, first.ratio) == (pytest.approx(0.15), None)
    assert second.mean == pytest.approx(0.3)
    assert second.ratio == Ratio(mean=pytest.approx(2.0), low=pytest.approx(2.0), high=pytest.approx(2.0))
    assert heavy.values[0][1].ratio == Ratio(mean=pytest.approx(3.0))


def test_a_repeat_that_one_system_lacks_is_no_pair() -> None:
    (comparison,) = compare([run("first", 0, 0.1), run("first", 1, 0.1), run("second", 0, 0.3)])
    assert comparison.values[0][1].ratio == Ratio(mean=pytest.approx(3.0))


def test_what_never_finished_has_no_latency_and_json_says_null() -> None:
    (comparison,) = compare([run("first", 0, 0.1), run("second", 0, 0.1, ending=Ending.TIMED_OUT)])
    assert comparison.values[0][1].mean is None
    text = msgspec.json.encode(comparison)
    assert b"NaN" not in text
    assert msgspec.json.decode(text, type=LoadComparison) == comparison
