"""Traces in the formats that people publish, arrivals, fitted lengths, standard workloads, sessions."""

import contextlib
import gzip
import itertools
import json
import math
import statistics
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg.base.errors import ConfigurationError
from disagg.measure.arrivals import MOONCAKE_BATCH_S, ArrivalKind, Arrivals
from disagg.measure.lengths import DrawnLengths, LengthDistribution
from disagg.measure.open_loop import FixedLengths, LengthLimits, OpenLoop
from disagg.measure.sessions import read_sessions, shorten, start_sessions
from disagg.measure.slo import Slo
from disagg.measure.standard import STANDARD_WORKLOADS, SloKind, slo_from_unloaded, standard_workload
from disagg.measure.trace import Trace
from disagg.measure.workload import RequestSpec, Session


def lengths(path: Path) -> list[tuple[int, int]]:
    return [(row.prompt_len, row.output_len) for row in Trace(path).rows()]


def times(path: Path) -> list[float]:
    return [row.arrival_s for row in Trace(path).rows()]


# Files ----------------------------------------------------------------------------------------------------------


def test_mooncake_lines(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl.gz"
    rows = [
        {"timestamp": 3000, "input_length": 600, "output_length": 5, "hash_ids": [7, 8]},
        {"timestamp": 4500, "input_length": 10, "output_length": 0, "hash_ids": [9]},
    ]
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    trace = Trace(path)
    assert lengths(path) == [(600, 5), (10, 1)]
    assert times(path) == [0.0, 1.5]
    assert [row.prefix.ids for row in trace.rows()] == [(7, 8), (9,)]
    assert trace.rate == pytest.approx(1 / 1.5)


def test_azure_columns_count_from_the_first_request(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 23:59:59.9799600,4808,10\n2023-11-17 00:00:00.0319600,3180,8\n"
    )
    assert lengths(path) == [(4808, 10), (3180, 8)]
    assert times(path) == pytest.approx([0.0, 0.052], abs=1e-6)


def test_the_azure_week_of_2024_has_a_mark_and_time_zones(tmp_path: Path) -> None:
    path = tmp_path / "week.csv.gz"
    rows = (
        "2024-05-12 00:00:00.001163+00:00,100,10",
        "2024-05-12 00:00:02+00:00,30,4",
        "2024-05-12T02:00:03+02:00,5,1",
    )
    path.write_bytes(gzip.compress("\n".join(["\ufeffTIMESTAMP,ContextTokens,GeneratedTokens", *rows]).encode()))
    assert lengths(path) == [(100, 10), (30, 4), (5, 1)]
    assert times(path) == pytest.approx([0.0, 2 - 0.001163, 3 - 0.001163], abs=1e-6)


def test_blank_lines_and_a_mark_say_nothing(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    row = '{"input_length": 600, "output_length": 5, "hash_ids": [7, 8]}\n'
    path.write_text(f"\ufeff{row}\n  \n{row}\n", encoding="utf-8")
    assert [(row.line, row.prefix.ids) for row in Trace(path).rows()] == [(1, (7, 8)), (4, (7, 8))]


@pytest.mark.parametrize(
    "fields",
    [
        {"timestamp": -1},
        {"timestamp": 1e300},
        {"timestamp": "inf"},
        {"input_length": 0},
        {"input_length": -5},
        {"input_length": 10**30},
        {"input_length": 1.5},
        {"output_length": -1},
        {"output_length": 10**12},
        {"hash_ids": [-1, 2]},
        {"hash_ids": [1, 2**64]},
        {"hash_ids": [1, 2, 3]},
        {"hash_ids": [1]},
    ],
)
def test_a_json_row_that_cannot_be_is_refused_with_its_line(fields: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    good = {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}
    path.write_text(json.dumps(good) + "\n\n" + json.dumps({**good, **fields}) + "\n")
    with pytest.raises(ConfigurationError, match="line 3"):
        Trace(path)


def test_the_hash_ids_of_a_row_are_one_for_each_block_of_512_tokens(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"input_length": 600, "output_length": 5, "hash_ids": [1, 2, 3]}\n')
    with pytest.raises(ConfigurationError, match=r"3 hash_ids for 600 tokens.*that is 2"):
        Trace(path)


@pytest.mark.parametrize(
    "row",
    [
        *(f"{time},10,2" for time in ("inf", "nan", "-inf", "-1", "1e300", "", "soon")),
        *(f"1,{prompt},2" for prompt in ("0", "-3", "nan", "inf", "1e3", "99999999999", "9" * 5000, "")),
        *(f"1,10,{output}" for output in ("-1", "nan", "99999999999", "")),
        "1,10",
        "1",
        '1,"10',
    ],
)
def test_a_csv_row_that_cannot_be_is_refused_with_its_line(row: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(f"arrival_s,prompt_len,output_len\n0,10,2\n{row}\n")
    with pytest.raises(ConfigurationError, match=r"line 3: .") as caught:
        Trace(path)
    assert len(str(caught.value)) < 6000


@pytest.mark.parametrize("time", ["soon", "nan", "1.5", "", "2024-13-01 00:00:00", "1969-12-31 23:59:59", "2400-01-01"])
def test_an_azure_time_that_cannot_be_is_refused_with_its_line(time: str, tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-12 00:00:00,1,1\n{time},1,1\n")
    with pytest.raises(ConfigurationError, match="line 3"):
        Trace(path)


@pytest.mark.parametrize("rows", [("", '"timestamp": 5,'), ('"timestamp": 5,', "")])
def test_times_in_some_rows_only_are_refused(rows: tuple[str, str], tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(f'{{{time}"input_length": 1, "output_length": 1}}\n' for time in rows))
    with pytest.raises(ConfigurationError, match=r"line 2: .*either every request has a time or none"):
        Trace(path)


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "jsonl", "jsonl.gz"])
@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"", b"\x1f\x8b\x08\x00garbage", b'a,"' + b"x" * 200_000])
def test_a_file_that_is_no_trace_is_refused(content: bytes, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"trace.{ending}"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match="trace"):
        Trace(path)


def test_a_slice_of_a_trace_counts_from_its_own_first_request(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,prompt_len,output_len\n" + "".join(f"{10 + 2 * row},{row + 1},3\n" for row in range(6)))
    part = Trace(path, 3, first=2)
    assert [(row.arrival_s, row.prompt_len) for row in part.rows()] == [(0, 3), (2, 4), (4, 5)]
    assert (len(part), part.rate) == (3, 0.5)
    with pytest.raises(ConfigurationError, match="from number 6 on"):
        Trace(path, 3, first=6)


def test_columns_without_times(tmp_path: Path) -> None:
    path = tmp_path / "vidur.csv"
    path.write_text("num_prefill_tokens,num_decode_tokens,pd_ratio\n3772,54,69.85\n")
    assert lengths(path) == [(3772, 54)]
    assert not Trace(path).has_times
    with pytest.raises(ConfigurationError, match="give --rate"):
        OpenLoop(Trace(path), Arrivals())


def test_the_reference_traces_have_their_published_figures(reference_data: Path) -> None:
    trace = Trace(reference_data / "traces" / "azure2023_conv.jsonl.gz")
    assert len(trace) == 10_108
    assert trace.rate == pytest.approx(5.62, rel=0.01)
    assert statistics.mean(row.prompt_len for row in trace.rows()) == pytest.approx(1243, abs=1)


@pytest.mark.parametrize(
    "name",
    [
        "AzureLLMInferenceTrace_conv.head100.csv",
        "vidur_arxiv_summarization.head100.csv",
        "mooncake_conversation_trace.head100.jsonl",
    ],
)
def test_the_sources_own_formats_are_read(name: str, reference_data: Path) -> None:
    assert len(Trace(reference_data / "traces" / "raw_samples" / name)) in (99, 100)


# Arrivals -------------------------------------------------------------------------------------------------------


def drawn(arrivals: Arrivals, count: int = 4000) -> list[float]:
    return [row.arrival_s for row in OpenLoop(FixedLengths(10, 10, count), arrivals).draw(0)]


@pytest.mark.parametrize(
    ("kind", "cv"), [(ArrivalKind.POISSON, 1.0), (ArrivalKind.GAMMA, 3.0), (ArrivalKind.GAMMA, 0.5)]
)
def test_drawn_arrivals_keep_rate_and_burstiness(kind: ArrivalKind, cv: float) -> None:
    arrivals = drawn(Arrivals(kind, rate=5.0, gap_cv=cv))
    gaps = [after - before for before, after in itertools.pairwise([0.0, *arrivals])]
    assert statistics.mean(gaps) == pytest.approx(0.2, rel=0.15)
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(cv, rel=0.15)


def test_a_replay_is_stretched_to_a_rate(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("arrival_s,prompt_len,output_len\n5,1,1\n6,1,1\n9,1,1\n")
    workload = OpenLoop(Trace(path), Arrivals(rate=1.0))
    assert [row.arrival_s for row in workload.draw(0)] == [0.0, 0.5, 2.0]
    assert [row.arrival_s for row in workload.at_rate(2.0).draw(0)] == [0.0, 0.25, 1.0]
    assert not workload.is_drawn


def test_batches_of_a_trace_are_spread_to_a_plain_process(reference_data: Path) -> None:
    trace = Trace(reference_data / "traces" / "mooncake_conversation.jsonl.gz", 2000)
    workload = OpenLoop(trace, Arrivals(batch_s=MOONCAKE_BATCH_S))
    arrivals = [row.arrival_s for row in workload.draw(1)]
    gaps = [after - before for before, after in itertools.pairwise(arrivals)]
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(1.0, abs=0.15)
    assert workload.is_drawn


@given(st.lists(st.integers(0, 10), min_size=1, max_size=50), st.integers(0, 5))
def test_spreading_keeps_every_request_and_puts_them_in_order(batches: list[int], seed: int) -> None:
    rows = [RequestSpec(n + 1, 1, arrival_s=3.0 * batch) for n, batch in enumerate(sorted(batches))]
    spread = list(Arrivals(batch_s=3.0).time(rows, 1.0, seed))
    assert sorted(row.prompt_len for row in spread) == [row.prompt_len for row in rows]
    assert all(before.arrival_s <= after.arrival_s for before, after in itertools.pairwise(spread))
    by_name = {row.prompt_len: row.arrival_s for row in rows}
    assert all(0 <= row.arrival_s - by_name[row.prompt_len] <= 3.0 for row in spread)


@pytest.mark.parametrize("values", [{"rate": 0.0}, {"rate": math.inf}, {"kind": ArrivalKind.POISSON}, {"gap_cv": 0.0}])
def test_arrivals_that_cannot_be_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        Arrivals(**values)  # type: ignore[arg-type]


# Lengths --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(2, 3000))
def test_cut_requests_fit_and_keep_a_token_of_each(prompt_len: int, output_len: int, most: int) -> None:
    cut = LengthLimits(max_prompt_len=2000, max_output_len=400, max_total_len=most).cut(
        RequestSpec(prompt_len, output_len)
    )
    assert 1 <= cut.prompt_len <= min(prompt_len, 2000)
    assert 1 <= cut.output_len <= min(output_len, 400)
    assert cut.prompt_len + cut.output_len <= most


def test_fitted_lengths_are_drawn_like_the_trace(reference_data: Path) -> None:
    rows = list(Trace(reference_data / "traces" / "azure2023_conv.jsonl.gz").rows())
    found = LengthDistribution.fit(rows)
    again = list(DrawnLengths("again", found, 5000).rows(3))
    for of in ("prompt_len", "output_len"):
        measured = statistics.mean(getattr(row, of) for row in rows)
        assert statistics.mean(getattr(row, of) for row in again) == pytest.approx(measured, rel=0.1)
    assert found.prompt_quantiles[7] == 1033
    carried = STANDARD_WORKLOADS["chat"].lengths
    assert [round(value) for value in found.prompt_quantiles] == list(carried.prompt_quantiles)
    assert [round(value) for value in found.output_quantiles] == list(carried.output_quantiles)


def test_lengths_that_go_together_are_drawn_together() -> None:
    rows = [RequestSpec(n, 2 * n) for n in range(1, 200)]
    found = LengthDistribution.fit(rows)
    assert found.correlation == pytest.approx(1.0)
    assert all(abs(row.output_len - 2 * row.prompt_len) <= 12 for row in DrawnLengths("both", found, 100).rows(0))


def test_a_handful_of_requests_is_no_distribution() -> None:
    with pytest.raises(ConfigurationError, match="too few"):
        LengthDistribution.fit([RequestSpec(1, 1)] * 49)


# Standard workloads ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STANDARD_WORKLOADS)
def test_a_standard_workload_is_drawn_alike_for_equal_seeds(name: str) -> None:
    workload = standard_workload(name, rate=2.0, num_requests=60)
    first = list(workload.draw(1))
    assert len(first) == len(workload) == 60
    assert first == list(workload.draw(1))
    assert first != list(workload.draw(2))
    limits = STANDARD_WORKLOADS[name].limits
    assert all(row.prompt_len <= limits.max_prompt_len and row.output_len <= limits.max_output_len for row in first)


@pytest.mark.parametrize("name", STANDARD_WORKLOADS)
def test_a_standard_workload_is_replayed_where_its_trace_is(name: str, reference_data: Path) -> None:
    workload = standard_workload(name, 2.0, 200, reference_data / "traces")
    rows = list(workload.draw(0))
    assert len(rows) == 200
    assert all(before.arrival_s <= after.arrival_s for before, after in itertools.pairwise(rows))
    if name in ("chat", "code", "reason"):
        assert (len(rows) - 1) / rows[-1].arrival_s == pytest.approx(2.0)


def test_unknown_and_absent_workloads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="there are chat, code, summarise, reason"):
        standard_workload("poetry", 1.0, 10)
    with pytest.raises(ConfigurationError, match="is not there"):
        standard_workload("chat", 1.0, 10, tmp_path)


def test_objectives_follow_from_an_idle_server() -> None:
    assert slo_from_unloaded(SloKind.TIGHT, 0.1, 0.01) == Slo(ttft_s=0.5, tpot_s=0.015)
    assert slo_from_unloaded(SloKind.LOOSE, 0.1, 0.01) == Slo(ttft_s=2.5, tpot_s=0.04)


# Sessions -------------------------------------------------------------------------------------------------------


def test_sessions_of_agents_share_their_growing_prefix(reference_data: Path) -> None:
    sessions = list(read_sessions(reference_data / "traces" / "agent_coding_128k.jsonl.gz", num_sessions=20))
    mains = [session for session in sessions if "/" not in session.name]
    assert len(mains) == 20
    first, second = mains[0].calls[:2]
    assert second.prefix.ids[: len(first.prefix.ids) - 1] == first.prefix.ids[:-1]
    assert all(call.think_s <= 30 for session in sessions for call in session.calls)
    ids = [set(session.calls[0].prefix.ids) for session in mains]
    assert not any(one & other for one, other in itertools.combinations(ids, 2))


def test_sessions_start_by_a_seeded_process_and_fit_a_small_model(reference_data: Path) -> None:
    sessions = list(read_sessions(reference_data / "traces" / "agent_coding_128k.jsonl.gz", num_sessions=5))
    started = list(start_sessions(sessions, rate=0.5, seed=1))
    assert started == list(start_sessions(sessions, rate=0.5, seed=1))
    assert all(session.start_s > 0 for session in started)
    short = shorten(started[0], factor=1 / 32, max_total_len=2048)
    assert isinstance(short, Session)
    assert short.calls
    assert all(call.prompt_len + call.output_len <= 2048 for call in short.calls)
    assert short.calls[0].prefix.block_tokens == 2


def test_a_file_that_holds_no_sessions_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "sessions.jsonl"
    path.write_text('{"session_id": "a", "input_length": 3, "output_length": 1}\n{"input_length": 3}\n')
    with pytest.raises(ConfigurationError, match="line 2 is no call"):
        list(read_sessions(path))


def test_the_calls_of_sessions_are_no_requests_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "sessions.jsonl"
    path.write_text('{"session_id": "a", "input_length": 3, "output_length": 1}\n')
    with pytest.raises(ConfigurationError, match=r"line 1.*--sessions"):
        Trace(path)


@pytest.mark.parametrize(
    "fields",
    [
        {"input_length": 0},
        {"input_length": 10**30},
        {"output_length": -1},
        {"t": -1},
        {"t": 1e300},
        {"think_ms": -5},
        {"think_ms": 1e300},
        {"hash_runs": [[-1, 2]]},
        {"hash_runs": [[0, -2]]},
        {"hash_runs": [[0, 10**15]]},
        {"hash_runs": [[2**40, 2]]},
        {"hash_runs": [[0, 4]]},
        {"hash_runs": [[0, 1]]},
    ],
)
def test_a_call_that_cannot_be_is_refused_with_its_line(fields: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "sessions.jsonl"
    good = {"session_id": "a", "input_length": 128, "output_length": 1, "t": 0, "think_ms": 1, "hash_runs": [[0, 2]]}
    path.write_text(json.dumps(good) + "\n\n" + json.dumps({**good, **fields}) + "\n")
    with pytest.raises(ConfigurationError, match="line 3 is no call"):
        list(read_sessions(path))


def test_a_session_whose_calls_are_not_together_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sessions.jsonl"
    path.write_text("".join(f'{{"session_id": "{name}", "input_length": 3, "output_length": 1}}\n' for name in "aba"))
    with pytest.raises(ConfigurationError, match=r"line 3.*sort the file by session"):
        list(read_sessions(path))


def test_a_session_with_a_slash_in_its_name_is_no_sub_agent(tmp_path: Path) -> None:
    path = tmp_path / "sessions.jsonl"
    path.write_text('{"session_id": "a/b", "input_length": 3, "output_length": 1, "t": 5000}\n')
    (started,) = start_sessions(read_sessions(path), rate=1.0, seed=0)
    (other,) = start_sessions([Session("a", started.calls)], rate=1.0, seed=0)
    assert started.start_s == other.start_s


# Anything at all -------------------------------------------------------------------------------------------------

numbers = st.one_of(
    st.integers(-5, 2000),
    st.integers(),
    st.floats(),
    st.sampled_from(["", "nan", "-inf", "1e400", "2024-05-12 00:00:00+00:00", None, [], "x" * 300]),
)
NAMES = ("timestamp", "input_length", "output_length", "hash_ids", "session_id", "t", "think_ms", "hash_runs", "turns")


@given(st.lists(st.dictionaries(st.sampled_from(NAMES), st.one_of(numbers, st.lists(numbers, max_size=3)))))
def test_any_json_lines_are_read_or_refused_in_words(rows: list[dict[str, object]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "any.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for read in (lambda: Trace(path).rows(), lambda: read_sessions(path)):
            with contextlib.suppress(ConfigurationError):
                assert all(one is not None for one in read())


@given(
    st.sampled_from(["arrival_s,prompt_len,output_len", "TIMESTAMP,ContextTokens,GeneratedTokens"]),
    st.lists(st.lists(numbers.map(str), max_size=4).map(",".join)),
)
def test_any_csv_is_read_or_refused_in_words(head: str, rows: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "any.csv"
        path.write_text("\n".join([head, *rows]))
        with contextlib.suppress(ConfigurationError):
            times = [row.arrival_s for row in Trace(path).rows()]
            assert times == sorted(times)
            assert all(0 <= time < 1e10 for time in times)
