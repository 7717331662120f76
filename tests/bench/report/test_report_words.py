import math

import pytest

from disagg.bench.report.words import by_system, milliseconds, objective, objectives, percent, ratio, seconds
from disagg.measure.slo import Slo


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.234, "1.23 s"),
        (0.0382, "38.2 ms"),
        (0.412, "412 ms"),
        (42e-6, "42.0 µs"),
        (math.nan, "–"),
        (12345, "12,345 s"),
    ],
)
def test_seconds_take_the_unit_that_suits(value: float, text: str) -> None:
    assert seconds(value) == text


@pytest.mark.parametrize(("share", "text"), [(1.0, "100 %"), (0.934, "93 %"), (0.996, "99.6 %"), (0.0, "0 %")])
def test_shares_are_exact_where_it_matters(share: float, text: str) -> None:
    assert percent(share) == text


@pytest.mark.parametrize(
    ("value", "reference", "text"),
    [(1, 2, "×0.50"), (2.091, 1, "×2.09"), (0.012, 1, "×0.012"), (123.4, 1, "×123"), (1, 0, ""), (math.nan, 1, "")],
)
def test_ratios(value: float, reference: float, text: str) -> None:
    assert ratio(value, reference) == text


def test_objectives_are_told_as_they_were_set() -> None:
    assert objective(0.05) == "50 ms"
    assert objectives(Slo(ttft_s=1.5, tpot_s=0.0125)) == "TTFT ≤ 1.5 s, TPOT ≤ 12.5 ms"
    assert objectives(Slo()) == "none"


def test_titles_name_few_systems_or_the_extremes_of_many() -> None:
    few = {"a": 0.2, "b": 0.1, "c": 0.3}
    assert by_system(few, seconds) == "200 ms with a, 100 ms with b, 300 ms with c"
    assert by_system({**few, "d": 0.15, "e": 0.12}, seconds) == "100 ms with b, 300 ms with c; 3 between"


def test_a_missing_time_is_a_dash() -> None:
    assert milliseconds(math.nan) == "–"
    assert milliseconds(0.0123) == "12.3"
