"""Streams cut anywhere say the same; tokens are counted by what the server tells, not by how it packs them."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg.bench.client.answer_stream import Stream, StreamReader, read_error


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def text(piece: str | None, total: int | None = None, finish_reason: str | None = None) -> bytes:
    usage = None if total is None else {"completion_tokens": total, "prompt_tokens": 5}
    return event(choices=[{"index": 0, "text": piece, "finish_reason": finish_reason}], usage=usage)


def delta(total: int | None = None, **fields: Any) -> bytes:
    usage = {} if total is None else {"usage": {"completion_tokens": total}}
    finish_reason = fields.pop("finish_reason", None)
    return event(choices=[{"delta": fields, "finish_reason": finish_reason}], **usage)


def usage(total: int) -> bytes:
    return event(choices=[], usage={"completion_tokens": total, "prompt_tokens": 7})


DONE = b"data: [DONE]\n\n"


def read(*events: bytes) -> Stream:
    """Read events that arrive a second apart."""
    return StreamReader().read([(float(second), data) for second, data in enumerate(events)])


@settings(deadline=None)
@given(st.data())
def test_events_have_the_moment_of_the_piece_that_completes_them_however_they_are_cut(data: st.DataObject) -> None:
    events = [text("a", 1), text(None, 2), text("ä" * 20, 4), text("", 5, "length"), usage(5), DONE]
    whole = b"".join(events)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(whole) - 1), max_size=30)))
    pieces = [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    stream = read(*pieces)
    ends = [sum(map(len, events[: number + 1])) - 1 for number in range(4)]  # where the line of each event ends
    moments = [next(n for n in range(len(pieces)) if sum(map(len, pieces[: n + 1])) >= end) for end in ends]
    assert stream.event_s == tuple(moments)
    assert stream.event_tokens == (1, 1, 2, 1)
    assert stream.is_whole
    assert stream.prompt_tokens == 7


def test_without_counts_an_event_is_a_token() -> None:
    stream = read(text("a"), text("b"), text("c", finish_reason="length"), DONE)
    assert stream.event_tokens == (1, 1, 1)
    assert stream.event_s == (0, 1, 2)


def test_a_total_at_the_end_is_spread_over_the_events() -> None:
    stream = read(text("a"), text("bcd"), text("ef"), text("", finish_reason="length"), usage(7), DONE)
    assert stream.event_s == (0, 1, 2)
    assert sum(stream.event_tokens) == 7
    assert min(stream.event_tokens) >= 1


def test_a_running_total_says_which_event_carried_several_tokens() -> None:
    stream = read(text("a", 1), text("bcd", 4), text("e", 5, "length"), usage(5), DONE)
    assert stream.event_tokens == (1, 3, 1)


def test_a_first_token_that_is_part_of_a_character_counts_when_the_server_tells_of_it() -> None:
    """vLLM sends an event without text for it; this server and llama.cpp send nothing until the character is whole."""
    as_vllm = read(text("", 1), text("é", 2), text("a", 3, "length"), DONE)
    assert (as_vllm.event_s, as_vllm.event_tokens) == ((0, 1, 2), (1, 1, 1))
    as_ours = read(text("é", 2), text("a", 3, "length"), DONE)
    assert (as_ours.event_s, as_ours.event_tokens) == ((0, 1), (2, 1))
    without_counts = read(text(""), text("é"), text("a", finish_reason="length"), DONE)
    assert without_counts.event_tokens == (1, 1, 1)


def test_the_event_that_opens_a_chat_is_no_token() -> None:
    stream = read(
        delta(role="assistant", content=""),
        delta(content="a"),
        delta(content="b"),
        delta(finish_reason="length"),
        usage(2),
        DONE,
    )
    assert stream.event_s == (1, 2)
    counted = read(delta(0, role="assistant", content=""), delta(1, content="a"), delta(1, finish_reason="stop"), DONE)
    assert (counted.event_s, counted.event_tokens) == ((1,), (1,))


def test_reasoning_is_output_too() -> None:
    stream = read(delta(reasoning_content="hm"), delta(reasoning="so"), delta(content="a"), delta(finish_reason="stop"))
    assert stream.event_s == (0, 1, 2)


def test_usage_in_the_last_event_alone_is_no_running_total() -> None:
    stream = read(text("a"), text("b"), text("", 4, "length"), DONE)
    assert stream.event_s == (0, 1)
    assert sum(stream.event_tokens) == 4


def test_more_events_than_tokens_keep_the_total() -> None:
    stream = read(text("a"), text("b"), text("c"), text("d", finish_reason="length"), usage(2), DONE)
    assert sum(stream.event_tokens) == 2
    assert stream.event_s[0] == 0


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (event(error={"message": "the instance died", "code": 503}), "the instance died"),
        (event(error="out of memory"), "out of memory"),
        (event(object="error", message="no room"), "no room"),
        (b'error: {"message": "slot lost", "code": 500}\n\n', "slot lost"),
        (b"data: {nonsense\n\n", "malformed event {nonsense"),
    ],
)
def test_an_error_in_the_stream_is_told_and_what_came_before_it_kept(failure: bytes, message: str) -> None:
    stream = read(text("a", 1), failure, DONE)
    assert stream.error.startswith(message)
    assert not stream.is_whole
    assert stream.event_s == (0,)


def test_a_stream_that_is_cut_off_is_not_whole_and_its_half_event_nothing() -> None:
    stream = read(text("a", 1), text("b", 2)[:-20])
    assert not stream.is_whole
    assert not stream.error
    assert stream.event_s == (0,)


def test_carriage_returns_comments_and_a_missing_last_line_end_are_taken() -> None:
    stream = read(b": ping\r\n\r\n", text("a", 1, "length").replace(b"\n", b"\r\n"), b"data: [DONE]")
    assert stream.is_whole
    assert stream.event_s == (1,)


def test_nothing_at_all_is_an_empty_stream() -> None:
    assert read() == Stream((), (), None, is_whole=False)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "too many"}}', "too many"),
        (b'{"detail": "nope"}', '{"detail": "nope"}'),
        (b"<html>  bad\n gateway", "<html> bad gateway"),
        (b"x" * 1000, "x" * 297 + "..."),
    ],
)
def test_the_message_of_an_error_answer_is_found_or_its_beginning_shown(body: bytes, message: str) -> None:
    assert read_error(body) == message
