import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg.bench.report.window import (
    Window,
    choose_window,
    pack_lanes,
    stall_threshold_s,
    stalled_share,
    stalls,
    window_length_s,
)
from disagg.measure.record import Ending, RequestRecord
from disagg.measure.slo import Slo

spans = st.lists(
    st.tuples(st.floats(0, 100), st.floats(0.01, 20)).map(lambda pair: (pair[0], pair[0] + pair[1])), max_size=40
)


def answer(*events: float, index: int = 0) -> RequestRecord:
    return RequestRecord(
        index=index,
        request_id=str(index),
        prompt_len=10,
        max_output_len=len(events),
        due_s=0.0,
        sent_s=0.0,
        finished_s=events[-1],
        event_s=events,
        event_tokens=(1,) * len(events),
        ending=Ending.FINISHED,
    )


@given(spans)
def test_spans_of_one_lane_never_overlap(found: list[tuple[float, float]]) -> None:
    lanes = pack_lanes(found)
    for lane in set(lanes):
        own = sorted(span for span, its_lane in zip(found, lanes, strict=True) if its_lane == lane)
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(own))


@given(spans)
def test_there_are_as_many_lanes_as_spans_at_the_busiest_moment(found: list[tuple[float, float]]) -> None:
    busiest = max((sum(start <= moment < end for start, end in found) for moment, _ in found), default=0)
    assert len(set(pack_lanes(found))) == busiest


def test_a_stall_is_a_gap_beyond_the_tpot_objective() -> None:
    record = answer(1.0, 1.05, 1.4, 1.45)
    threshold_s = stall_threshold_s(Slo(tpot_s=0.1), [record])
    assert [(gap.start_s, gap.end_s) for gap in stalls(record, threshold_s)] == [(1.05, 1.4)]


def test_without_an_objective_a_stall_is_five_times_the_median_gap() -> None:
    assert stall_threshold_s(Slo(), [answer(0.0, 0.1, 0.2, 0.3, 1.0)]) == pytest.approx(0.5)
    assert stall_threshold_s(Slo(), [answer(0.0)]) == math.inf


def test_the_window_holds_the_most_stalled_time() -> None:
    calm = [n * 0.02 for n in range(500)]
    stalled = [*calm[:300], *(moment + 0.5 for moment in calm[300:])]
    window = choose_window([answer(*calm), answer(*stalled, index=1)], threshold_s=0.1, length_s=2.0)
    assert window.start_s <= calm[299]
    assert window.end_s >= calm[300] + 0.5


def test_without_stalls_the_window_is_where_most_tokens_come() -> None:
    sparse = [n * 0.5 for n in range(20)]
    dense = [5.0 + n * 0.02 for n in range(50)]
    window = choose_window([answer(*sparse), answer(*dense, index=1)], threshold_s=1.0, length_s=1.0)
    assert window.start_s == pytest.approx(5.0)


def test_a_run_without_answers_has_a_window_too() -> None:
    assert choose_window([], 0.1, 2.0) == Window(0.0, 2.0)


@pytest.mark.parametrize(
    ("gap_s", "span_s", "length_s"),
    [(0.012, 60.0, 2.0), (0.03, 60.0, 5.0), (0.05, 60.0, 10.0), (0.05, 4.0, 4.0), (0.0, 7.0, 7.0)],
)
def test_a_window_is_a_round_number_of_seconds_with_about_200_gaps(
    gap_s: float, span_s: float, length_s: float
) -> None:
    assert window_length_s([gap_s] * 9, span_s) == pytest.approx(length_s)


def test_the_stalled_share_counts_only_what_lies_in_the_window() -> None:
    record = answer(0.0, 1.0, 1.1, 1.2, 1.3, 1.4, 2.0)
    assert stalled_share([record], 0.5, Window(0.0, 2.0)) == pytest.approx(1.6 / 2.0)
    assert stalled_share([record], 0.5, Window(1.0, 0.4)) == 0.0
    assert stalled_share([], 0.5, Window(0.0, 1.0)) == 0.0
