"""Sessions of GitHub Copilot's agents, in rows made up after the schema that is published with the data."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from disagg.base.errors import ConfigurationError
from disagg.measure.sessions import SessionWorkload, read_sessions
from disagg.measure.workload import Session


def call(at_s: float, prompt: int, *, cached: int = 0, duration_ms: float = 1000.0, **fields: Any) -> dict[str, Any]:
    completion = fields.pop("completion", 20)
    return {
        "message_id": f"m{at_s}",
        "timestamp": f"2026-06-01T08:{int(at_s) // 60:02}:{at_s % 60:09.6f}0Z",
        "duration_ms": duration_ms,
        "initiator_type": "agent",
        "model": "Model A",
        "result": "Success",
        "status_code": "OK",
        "tokens": {
            "total": prompt + completion,
            "prompt": prompt,
            "completion": completion,
            "cached": cached,
            "cached_pct": 100 * cached / max(1, prompt),
        },
        "message_metadata": [{"type": "System", "role": "system", "sequenceId": 0, "token_len": prompt}],
        **fields,
    }


def session(name: str, *turns: list[dict[str, Any]]) -> dict[str, Any]:
    batch = {"timestamp": "2026-06-01T08:00:01Z", "duration_ms": 500.0, "auto_continue": True, "function_calls": []}
    return {
        "session_id": name,
        "date": "2026-06-01",
        "turns": [
            {"turn_id": f"t{number}", "llm_calls": calls, "tool_batches": [batch]} for number, calls in enumerate(turns)
        ],
    }


def write(folder: Path, *rows: object) -> Path:
    path = folder / "shard-0000.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


def read(folder: Path, *rows: object, **options: Any) -> list[Session]:
    return list(read_sessions(write(folder, *rows), **options))


def test_calls_follow_one_another_after_what_was_thought(tmp_path: Path) -> None:
    turns = [call(0, 1000), call(3, 1200, completion=0)], [call(100, 1300)]
    (one,) = read(tmp_path, session("abc", *turns))
    assert one.name == "abc"
    assert [(one.prompt_len, one.output_len) for one in one.calls] == [(1000, 20), (1200, 1), (1300, 20)]
    assert [one.think_s for one in one.calls] == pytest.approx([0.0, 2.0, 30.0], abs=1e-5)


def test_calls_come_in_the_order_of_their_times(tmp_path: Path) -> None:
    (one,) = read(tmp_path, session("abc", [call(9, 300), call(3, 200)], [call(0, 100)]))
    assert [call.prompt_len for call in one.calls] == [100, 200, 300]


def test_calls_at_once_are_sub_agents(tmp_path: Path) -> None:
    calls = [call(0, 1000, duration_ms=9000), call(2, 500), call(5, 600), call(10, 1100)]
    main, other = read(tmp_path, session("a/b", calls))
    assert (main.name, other.name) == ("a_b", "a_b/1")
    assert [one.prompt_len for one in main.calls] == [1000, 1100]
    assert [one.prompt_len for one in other.calls] == [500, 600]
    assert (main.start_s, other.start_s) == pytest.approx((0.0, 2.0), abs=1e-5)


def test_what_was_cached_is_equal_to_the_prompt_before(tmp_path: Path) -> None:
    calls = [call(0, 640, cached=128), call(5, 1280, cached=640), call(9, 320, cached=192), call(12, 100, cached=0)]
    (one,) = read(tmp_path, session("abc", calls))
    first, second, compacted, short = (call.prefix.ids for call in one.calls)
    assert [len(ids) for ids in (first, second, compacted, short)] == [10, 20, 5, 1]
    assert second[:10] == first
    assert compacted[:3] == first[:3]
    assert not set(compacted[3:]) & set(second)
    assert not set(short) & {*first, *second, *compacted}


def test_what_is_cached_at_first_is_shared_by_sessions_to_one_model(tmp_path: Path) -> None:
    rows = [session(name, [call(0, 640, cached=cached)]) for name, cached in (("a", 320), ("b", 256), ("c", 0))]
    rows.append(session("d", [call(0, 640, cached=320, model="Model B")]))
    a, b, c, d = (one.calls[0].prefix.ids for one in read(tmp_path, *rows))
    assert a[:4] == b[:4]
    assert a[4] not in b
    assert not set(a) & set(c)
    assert not set(a) & set(d)


def test_another_model_knows_nothing_of_the_prompt_before(tmp_path: Path) -> None:
    calls = [call(0, 640), call(5, 640, cached=320, model="Model B"), call(9, 640, cached=640)]
    (one,) = read(tmp_path, session("abc", calls))
    first, other, third = (call.prefix.ids for call in one.calls)
    assert not set(first) & set(other)
    assert third == first


def test_calls_that_reached_no_model_and_sessions_without_any_are_left_out(tmp_path: Path) -> None:
    failed = [call(1, 0, completion=0), call(2, 9, tokens=None), call(3, 9, tokens={"prompt": None})]
    rows = [session("a", [call(0, 100), *failed]), session("b", failed), {"session_id": "c", "turns": None}]
    rows.append({"session_id": "d", "turns": [{"llm_calls": None}]})
    (one,) = read(tmp_path, *rows)
    assert [call.prompt_len for call in one.calls] == [100]


def test_only_as_many_sessions_as_are_wanted(tmp_path: Path) -> None:
    rows = [session(name, [call(0, 100)]) for name in "abc"]
    assert [one.name for one in read(tmp_path, *rows, num_sessions=2)] == ["a", "b"]


def test_a_workload_of_them_starts_at_a_rate(tmp_path: Path) -> None:
    rows = [session(str(number), [call(0, 1000), call(4, 2000, cached=960)]) for number in range(20)]
    drawn = list(SessionWorkload(write(tmp_path, *rows), rate=2.0, length_factor=0.25).draw(seed=1))
    assert len(drawn) == 20
    assert drawn[-1].start_s == pytest.approx(10, rel=0.6)
    assert drawn[0].calls[1].prefix.block_tokens == 16


@pytest.mark.parametrize(
    "bad",
    [
        session("", [call(0, 1)]),
        session("b", [call(0, -1)]),
        session("b", [call(0, 10**30)]),
        session("b", [call(0, 1, completion=-1)]),
        session("b", [call(0, 1, cached=-1)]),
        session("b", [call(0, 1, duration_ms=-1.0)]),
        session("b", [call(0, 1, duration_ms=1e300)]),
        session("b", [call(0, 1, timestamp="soon")]),
        session("b", [call(0, 1, timestamp="1969-01-01T00:00:00Z")]),
        session("b", [call(0, 1, timestamp=None)]),
        session("a", [call(0, 1)]),
        {"turns": []},
        {"session_id": "b", "input_length": 1, "output_length": 1},
        3,
    ],
)
def test_a_session_that_cannot_be_is_refused_with_its_line(bad: object, tmp_path: Path) -> None:
    path = tmp_path / "shard.jsonl"
    path.write_text(f"{json.dumps(session('a', [call(0, 1)]))}\n\n{json.dumps(bad)}\n")
    with pytest.raises(ConfigurationError, match="line 3"):
        list(read_sessions(path))


@pytest.mark.parametrize("content", ["", "\n \n", "no json\n"])
def test_a_file_without_sessions_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "shard.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigurationError, match="session"):
        list(read_sessions(path))
