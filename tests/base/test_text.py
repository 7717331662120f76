"""Text on its way into a log."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg.base.text import one_line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("Größe 10 €", "Größe 10 €"),
        ("a\nERROR b", r"a\nERROR b"),
        ("\x1b[31mred\x9b", r"\x1b[31mred\x9b"),
        ("a\u2028b\x85c", r"a\u2028b\x85c"),
        ("\ud800", r"\ud800"),
    ],
)
def test_what_is_not_visible_is_escaped(text: str, line: str) -> None:
    assert one_line(text) == line


@given(st.text())
def test_no_text_makes_two_lines(text: str) -> None:
    assert len(one_line(text).splitlines()) <= 1
    one_line(text).encode()  # whatever surrogates it had
