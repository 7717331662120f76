"""What is said of names that nobody knows, and of numbers that no file may hold."""

import enum
import math
from typing import Annotated, Any

import msgspec
import pytest
from msgspec import Meta

from disagg.base.errors import ConfigurationError
from disagg.base.known_names import known_names
from disagg.base.structs import read_struct


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Square(msgspec.Struct, frozen=True, tag_field="shape", tag="square", forbid_unknown_fields=True):
    side: Annotated[float, Meta(gt=0)]
    colour: Colour | None = None


class Circle(msgspec.Struct, frozen=True, tag_field="shape", tag="circle", forbid_unknown_fields=True):
    radius: float


class Drawing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    shapes: tuple[Square | Circle, ...] = ()
    by_name: dict[str, Square] = {}


def test_a_name_is_answered_with_those_there_are_and_the_closest() -> None:
    assert known_names("chatt", ["chat", "code"]) == "there are chat, code; did you mean chat?"
    assert known_names("CODE", ["chat", "code"]) == "there are chat, code; did you mean code?"
    assert known_names("zebra", ["chat", "code"]) == "there are chat, code"
    assert known_names("chatt", ["chat"]) == "there is chat; did you mean chat?"
    assert known_names("chat", []) == "there are none"


def test_a_long_list_is_cut_but_the_closest_is_named() -> None:
    told = known_names("name77x", [f"name{number}" for number in range(100)])
    assert len(told) < 300
    assert told.endswith("did you mean name77?")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"shape": []}, r"unknown field `shape`; there are shapes, by_name; did you mean shapes\?"),
        ({"shapes": [{"shape": "sqare"}]}, r"there are square, circle; did you mean square\?"),
        ({"shapes": [{"shape": "circle", "radios": 1}]}, r"there are shape, radius; did you mean radius\?"),
        ({"shapes": [{"shape": "square", "side": 1, "colour": "blu"}]}, r"there are red, blue; did you mean blue\?"),
        ({"by_name": {"a.b": {"side": 1, "colr": "red"}}}, "unknown field `colr`.*did you mean colour"),
        ({"shapes": [{"shape": "square", "side": math.nan}]}, r"\$.shapes\[0\].side"),
        ({"shapes": [{"shape": "circle", "radius": math.inf}]}, r"inf at `\$.shapes\[0\].radius`"),
        ({"shapes": [{"shape": "circle", "radius": 10**400}]}, "out of range"),
        ({"shapes": 3}, "Expected `array`"),
        ([], "Expected `object`"),
    ],
)
def test_what_does_not_fit_is_told_with_its_place(data: Any, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        read_struct(data, Drawing)


def test_what_fits_is_read() -> None:
    data = {"shapes": [{"shape": "square", "side": 1, "colour": "red"}, {"shape": "circle", "radius": 2.5}]}
    assert read_struct(data, Drawing) == Drawing((Square(1.0, Colour.RED), Circle(2.5)))
