"""Stop strings and whole characters, whatever the tokens' borders."""

from collections.abc import Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from disagg.models.tokenizer import IncrementalDecoder, Tokenizer
from disagg.serve.api.answer import StopString, TextStream


class Pieces:
    """An incremental decoder whose tokens are given pieces of text."""

    def __init__(self, pieces: Sequence[str]) -> None:
        self.pieces = pieces

    def push(self, token_id: int) -> str:
        return self.pieces[token_id]

    def flush(self) -> str:
        return ""


def run(pieces: Sequence[str], stops: Sequence[str], include: bool = False) -> tuple[list[str], str | None]:
    """Return what each token shows, and the stop string that ended the answer."""
    decoder: Any = Pieces(pieces)
    stream = TextStream(decoder, [StopString(stop) for stop in stops], include_stop_string=include)
    shown = []
    for index in range(len(pieces)):
        shown.append(stream.push(index))
        if stream.stopped_by is not None:
            return shown, stream.stopped_by
    return [*shown, stream.finish()], None


def reference_cut(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """Look for stop strings after every character of the whole text; the longest of several counts."""
    for end in range(len(text) + 1):
        if ending := [stop for stop in stops if text.endswith(stop, 0, end)]:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


def test_a_stop_string_that_spans_tokens_is_never_shown() -> None:
    assert run(["one tw", "o thr", "ee"], ["two three"]) == (["one ", "", ""], "two three")


def test_text_is_held_back_no_longer_than_needed() -> None:
    shown, _ = run(["ab", "c", "d"], ["abx"])
    assert shown == ["", "abc", "d", ""]


def test_what_was_held_back_is_shown_when_the_answer_ends() -> None:
    assert run(["a", "b"], ["abc"]) == (["", "", "ab"], None)


def test_the_stop_string_is_shown_when_asked_for() -> None:
    assert run(["one tw", "o!"], ["two"], include=True) == (["one ", "two"], "two")


def test_the_stop_string_that_is_complete_first_counts() -> None:
    assert run(["abcd"], ["abcd", "bc"]) == (["a"], "bc")
    assert run(["a", "b", "c", "d"], ["abcd", "bc"]) == (["", "", "a"], "bc")


def test_min_tokens_pass_before_stop_strings_count() -> None:
    decoder: Any = Pieces(["x", "x"])
    stream = TextStream(decoder, [StopString("x")], min_tokens=1)
    assert stream.push(0) == "x"
    assert stream.push(1) == ""
    assert stream.stopped_by == "x"


@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_any_split_shows_what_the_whole_text_would(pieces: list[str], stops: list[str]) -> None:
    shown, stopped_by = run(pieces, stops)
    assert ("".join(shown), stopped_by) == reference_cut("".join(pieces), stops)


@given(
    pieces=st.lists(st.text("abc", min_size=1, max_size=4), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_only_what_could_begin_a_stop_string_is_held_back(pieces: list[str], stops: list[str]) -> None:
    decoder: Any = Pieces(pieces)
    stream = TextStream(decoder, [StopString(stop) for stop in stops])
    shown = ""
    for index in range(len(pieces)):
        shown += stream.push(index)
        if stream.stopped_by is not None:
            return
        held = "".join(pieces[: index + 1])[len(shown) :]
        assert held == "" or any(stop.startswith(held) for stop in stops)


@given(text=st.text(), stops=st.lists(st.text(min_size=1, max_size=3), max_size=2))
def test_characters_are_never_split(text: str, stops: list[str], tokenizer: Tokenizer) -> None:
    stream = TextStream(IncrementalDecoder(tokenizer), [StopString(stop) for stop in stops])
    shown = ""
    for byte in text.encode():
        shown += stream.push(byte)
        if stream.stopped_by is not None:
            break
    shown += stream.finish()
    assert shown == reference_cut(text, stops)[0]


@given(
    pieces=st.lists(st.text("ab", max_size=3), max_size=12), stop=st.text("ab", min_size=1, max_size=6).map(StopString)
)
def test_following_a_stop_string_keeps_the_longest_end_that_begins_it(pieces: list[str], stop: StopString) -> None:
    matched, text = 0, ""
    for piece in pieces:
        matched, end = stop.follow(matched, piece)
        text += piece
        if stop.text in text:
            assert (text[: len(text) - len(piece) + end]).endswith(stop.text)
            return
        assert end == -1
        assert matched == max(n for n in range(len(stop.text)) if text.endswith(stop.text[:n]))


def test_stop_strings_cost_time_in_proportion_to_the_text() -> None:
    # What begins a stop string again and again: looked for end by end, this would take 10^12 comparisons.
    stop = StopString("a" * 100_000 + "b")
    assert stop.follow(0, "a" * 300_000 + "b") == (100_001, 300_001)


def test_an_answer_that_ends_inside_a_character_says_so(tokenizer: Tokenizer) -> None:
    stream = TextStream(IncrementalDecoder(tokenizer))
    assert [stream.push(byte) for byte in "a€".encode()[:3]] == ["a", "", ""]
    assert stream.finish() == "\ufffd"
