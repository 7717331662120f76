"""Objectives as people write them, and the one place where stamps become latencies."""

import itertools
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg.base.errors import ConfigurationError
from disagg.measure.record import Ending, RequestRecord, read_records, write_records
from disagg.measure.slo import Slo, parse_slo
from disagg.measure.statistics import Estimate, LogHistogram, Percentiles, Share, ValueSketch
from disagg.measure.summary import summarize

SLO = Slo(ttft_s=0.25, tpot_s=0.1)


def record(index: int = 0, **values: object) -> RequestRecord:
    fields: dict[str, object] = {
        "index": index,
        "request_id": f"r{index}",
        "prompt_len": 10,
        "max_output_len": 4,
        "due_s": 1.0,
        "sent_s": 1.01,
        "event_s": (1.21, 1.26, 1.36),
        "event_tokens": (1, 1, 2),
        "finished_s": 1.37,
        "ending": Ending.FINISHED,
    }
    return RequestRecord(**{**fields, **values})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ["ttft=250ms,tpot=100ms", "ttft:250 tpot:100", "tpot=0.1s, ttft=0.25s", "ttft=250000us tpot:100"]
)
def test_objectives_can_be_written_in_both_languages(text: str) -> None:
    assert parse_slo(text) == SLO


def test_a_missing_objective_is_always_kept() -> None:
    only = parse_slo("tpot=50ms")
    assert only.is_met(1e9, 0.05)
    assert not only.is_met(0.0, 0.051)
    assert str(only) == "tpot=50ms"


@pytest.mark.parametrize("text", ["", "ttft", "ttft=1", "ttft=1s,ttft=2s", "e2e:3", "ttft=-1ms", "ttft=1s;tpot=1s"])
def test_what_is_no_objective_says_what_one_looks_like(text: str) -> None:
    with pytest.raises(ConfigurationError, match="ttft=250ms,tpot=100ms"):
        parse_slo(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ttft=1h", "no unit is called 'h'; there are us, ms, s, min"),
        ("tpot=5msec", r"no unit is called 'msec'.*did you mean ms\?"),
        ("ttf=250ms", r"no objective is called 'ttf'; there are ttft, tpot; did you mean ttft\?"),
        ("ttft=0ms", "above 0"),
        ("ttft:0 tpot:5", "above 0"),
        (f"ttft={'9' * 400}s", "at most a day"),
        ("ttft=1e9s", "not a pair"),
        ("ttft=nan", "not a pair"),
        ("ttft=infs", "not a pair"),
    ],
)
def test_a_bad_objective_is_told_what_it_could_be(text: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        parse_slo(text)


def test_an_objective_may_be_in_minutes() -> None:
    assert parse_slo("ttft=1.5min").ttft_s == 90.0


def test_scaled_objectives_are_looser() -> None:
    assert SLO.scaled(2) == Slo(ttft_s=0.5, tpot_s=0.2)


def test_stamps_become_latencies() -> None:
    one = record()
    assert one.ttft_s == pytest.approx(0.2)
    assert one.tpot_s == pytest.approx(0.15 / 3)
    assert one.gaps_s == pytest.approx((0.05, 0.1))
    assert one.e2e_s == pytest.approx(0.36)
    assert one.lateness_s == pytest.approx(0.01)
    assert one.meets(SLO)


def test_a_single_token_has_no_tpot_and_misses_none() -> None:
    one = record(event_s=(1.2,), event_tokens=(1,))
    assert math.isnan(one.tpot_s)
    assert one.meets(SLO)


def test_an_answer_in_one_event_has_no_tpot_and_is_not_seen_to_keep_one() -> None:
    one = record(event_s=(1.2,), event_tokens=(4,))
    assert math.isnan(one.tpot_s)
    assert one.is_tpot_unknown
    assert not one.meets(SLO)
    assert one.meets(Slo(ttft_s=0.25))
    summary = summarize([one, record()], SLO)
    assert (summary.attainment.count, summary.ttft_attainment.count, summary.tpot_attainment.count) == (1, 2, 1)
    assert summary.tpot.p50 == record().tpot_s


@pytest.mark.parametrize("ending", [ending for ending in Ending if ending is not Ending.FINISHED])
def test_whatever_did_not_finish_is_a_miss(ending: Ending) -> None:
    assert not record(ending=ending).meets(Slo())


def test_a_run_counts_every_request_that_was_sent() -> None:
    records = [
        record(0, due_s=0.0, sent_s=0.0, event_s=(0.1, 0.2), event_tokens=(1, 1), finished_s=0.2),
        record(1, due_s=1.0, sent_s=1.0, event_s=(1.3, 1.4), event_tokens=(1, 1), finished_s=1.4),
        record(2, due_s=2.0, ending=Ending.REFUSED, error="HTTP 429", event_s=(), event_tokens=()),
        record(3, due_s=3.0, sent_s=math.nan, ending=Ending.UNFINISHED, event_s=(), event_tokens=()),
    ]
    summary = summarize(records, SLO)
    assert (summary.num_requests, summary.num_finished) == (4, 2)
    assert summary.errors == {"HTTP 429": 1, "unfinished": 1}
    assert summary.attainment.share == 0.25
    assert summary.ttft_attainment.share == 0.25
    assert summary.tpot_attainment.share == 0.5
    assert summary.offered_rate == 1.0
    assert summary.span_s == 1.4
    assert summary.output_tokens_per_s == pytest.approx(4 / 1.4)
    assert summary.attainment.low < 0.25 < summary.attainment.high


def test_stage_shares_add_up_to_one() -> None:
    records = [record(0, stages={"prefill": 1.0, "decode": 3.0}), record(1, stages={"prefill": 2.0, "hand_over": 2.0})]
    shares = summarize(records, SLO).stage_shares
    assert shares == pytest.approx({"prefill": 3 / 8, "decode": 3 / 8, "hand_over": 2 / 8})


def test_an_empty_run_has_a_summary() -> None:
    summary = summarize([], SLO)
    assert summary.num_requests == 0
    assert math.isnan(summary.ttft.p50)


stamps = st.floats(0, 1e6, allow_nan=False)


@given(
    st.lists(st.tuples(stamps, st.lists(stamps, max_size=5), st.sampled_from(Ending), st.text(max_size=10)), max_size=5)
)
def test_records_survive_a_file(rows: list[tuple[float, list[float], Ending, str]]) -> None:
    import tempfile

    records = [
        record(n, due_s=due, event_s=tuple(events), event_tokens=(1,) * len(events), ending=ending, error=error)
        for n, (due, events, ending, error) in enumerate(rows)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.jsonl"
        write_records(records, path)
        assert list(read_records(path)) == records


def test_a_stamp_that_was_computed_as_missing_survives_a_file(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    write_records([record(sent_s=math.inf - math.inf, finished_s=float("nan"))], path)
    (one,) = read_records(path)
    assert math.isnan(one.sent_s)
    assert math.isnan(one.finished_s)


def test_a_file_of_something_else_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    write_records([record()], path)
    path.write_text(path.read_text() + '{"index": 1}\n')
    with pytest.raises(ConfigurationError, match=r"line 2 is not the record"):
        list(read_records(path))
    with pytest.raises(ConfigurationError, match="cannot read"):
        list(read_records(tmp_path / "nowhere"))


def test_gaps_between_times_count_like_single_values() -> None:
    times_s = [0.5, 0.75, 1.25, 1.2578125]
    one_by_one, at_once = LogHistogram(), LogHistogram()
    for before_s, after_s in itertools.pairwise(times_s):
        one_by_one.add(after_s - before_s, 3)
    at_once.add_between(times_s, 3)
    assert at_once.percentiles() == one_by_one.percentiles()
    assert at_once.percentiles().mean == pytest.approx(0.7578125 / 3)


def test_values_that_follow_equal_ones_count_like_single_values() -> None:
    one_by_one, at_once = LogHistogram(), LogHistogram()
    for value in (0.5, 0.5, 0.25, 0.5, 0.125, 0.125):
        one_by_one.add(value)
    at_once.add_all([0.5, 0.5, math.nan, 0.25, 0.0, 0.5, 0.125, 0.125, math.nan])
    assert at_once.percentiles() == one_by_one.percentiles()


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=200))
def test_a_histogram_gives_percentiles_to_a_percent(values: list[float]) -> None:
    histogram = LogHistogram()
    for value in values:
        histogram.add(value)
    found = histogram.percentiles()
    assert found.mean == pytest.approx(sum(values) / len(values), rel=1e-5)
    for part, percentile in ((0.5, found.p50), (0.9, found.p90), (0.99, found.p99)):
        exact = sorted(values)[max(0, math.ceil(part * len(values)) - 1)]
        assert percentile == pytest.approx(exact, rel=0.011)


def test_a_sketch_is_exact_until_it_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ValueSketch, "MOST_EXACT", 100)
    values = [1 + number * 0.01 for number in range(101)]
    sketch = ValueSketch()
    for value in values[:100]:
        sketch.add(value)
    assert sketch.percentiles() == Percentiles.of(values[:100])
    sketch.add(values[100])
    found, exact = sketch.percentiles(), Percentiles.of(values)
    assert found != exact
    assert found.mean == pytest.approx(exact.mean, rel=1e-9)
    for name in ("p50", "p90", "p99"):
        assert getattr(found, name) == pytest.approx(getattr(exact, name), rel=0.011)


def test_a_share_has_wilsons_interval() -> None:
    share = Share.of(9, 10)
    assert (share.low, share.high) == pytest.approx((0.596, 0.982), abs=1e-3)
    assert Share.of(10, 10).high == 1.0
    assert Share.of(0, 0) == Share(count=0, total=0, share=0.0, low=0.0, high=1.0)


def test_equal_runs_have_no_interval_not_one_of_rounding():
    assert Estimate.of([14.8 / 3] * 3) == Estimate(mean=14.8 / 3, half_width=0.0)
