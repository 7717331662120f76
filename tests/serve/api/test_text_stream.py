"""Stop strings and whole characters, whatever the tokens' borders."""

from hypothesis import given
from hypothesis import strategies as st

from disagg.serve.api.text_stream import TextStream


class Pieces:
    """An incremental decoder whose tokens are given pieces of text."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces

    def push(self, token_id: int) -> str:
        return self.pieces[token_id]

    def flush(self) -> str:
        return ""


def run(pieces: list[str], stops: list[str], include: bool = False) -> tuple[list[str], str | None]:
    stream = TextStream(Pieces(pieces), stops, include_stop_string=include)  # type: ignore[arg-type]
    shown = []
    for index in range(len(pieces)):
        shown.append(stream.push(index))
        if stream.stopped_by is not None:
            return shown, stream.stopped_by
    return [*shown, stream.finish()], None


def test_a_stop_string_that_spans_tokens_is_never_shown() -> None:
    assert run(["one tw", "o thr", "ee"], ["two three"]) == (["one ", "", ""], "two three")


def test_text_is_held_back_no_longer_than_needed() -> None:
    shown, _ = run(["ab", "c", "d"], ["abx"])
    assert shown == ["", "abc", "d", ""]


def test_what_was_held_back_is_shown_when_the_answer_ends() -> None:
    assert run(["a", "b"], ["abc"]) == (["", "", "ab"], None)


def test_the_stop_string_is_shown_when_asked_for() -> None:
    assert run(["one tw", "o!"], ["two"], include=True) == (["one ", "two"], "two")


def test_min_tokens_pass_before_stop_strings_count() -> None:
    stream = TextStream(Pieces(["x", "x"]), ["x"], min_tokens=1)  # type: ignore[arg-type]
    assert stream.push(0) == "x"
    assert stream.push(1) == ""
    assert stream.stopped_by == "x"


letters = st.text("abc", max_size=4)


@given(pieces=st.lists(letters, max_size=12), stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_any_split_shows_the_text_before_the_stop_that_is_complete_first(pieces: list[str], stops: list[str]) -> None:
    shown, stopped_by = run(pieces, stops)
    text = "".join(pieces)
    if stopped_by is None:
        assert "".join(shown) == text
        assert not any(stop in text for stop in stops)
    else:
        before = "".join(shown)
        assert text.startswith(before + stopped_by)
        assert not any(stop in before for stop in stops)
