"""Tables of which method takes which type."""

import pytest

from disagg.base.by_type import by_type
from disagg.base.errors import InternalError


class Taker:
    def _on_number(self, one: int | float) -> str:
        return f"number {one}"

    def _on_text(self, one: str, times: int) -> str:
        return one * times

    def _other(self, one: bytes) -> bytes:
        return one


class Rival(Taker):
    def _on_number(self, one: int) -> str:
        return str(one)

    def _on_whole(self, one: int) -> str:
        return str(one)


def test_each_type_has_the_method_whose_parameter_is_annotated_with_it() -> None:
    table = by_type(int | float | str, Taker, "_on_")
    assert table == {int: Taker._on_number, float: Taker._on_number, str: Taker._on_text}
    assert table[str](Taker(), "ab", 2) == "abab"


def test_a_type_that_none_takes_is_named() -> None:
    with pytest.raises(InternalError, match=r"not taken.*: bytes"):
        by_type(int | float | str | bytes, Taker, "_on_")


def test_a_type_that_is_never_to_be_taken_is_named() -> None:
    with pytest.raises(InternalError, match="among what is to be: str"):
        by_type(int | float, Taker, "_on_")


def test_a_type_that_two_take_is_named() -> None:
    with pytest.raises(InternalError, match=r"Rival._on_number and Rival._on_whole both take int"):
        by_type(int | str, Rival, "_on_")
