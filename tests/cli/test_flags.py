"""Flags out of structs."""

import enum
from typing import Annotated

import click
import msgspec
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta

from disagg.base.config import CacheSettings, ModelSettings, RouterSettings, SchedulerSettings, ServeSettings
from disagg.base.errors import ConfigurationError
from disagg.base.units import format_bytes, format_ranges
from disagg.cli.flags import NOT_FLAGS, ByteSize, IntegerList, build, flag_name, flags_of
from disagg.serve.launch.deployment import HostSettings

REAL = (CacheSettings, HostSettings, ModelSettings, RouterSettings, SchedulerSettings, ServeSettings)


class Colour(enum.Enum):
    LIGHT_RED = "light-red"
    BLUE = "blue"


class Paint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    colour: Annotated[Colour, Meta(description="colour of all")] = Colour.BLUE
    num_coats: Annotated[int, Meta(ge=1, le=9, description="how often")] = 2
    wait_s: Annotated[float, Meta(gt=0, description="seconds between")] = 1.5
    bucket_bytes: Annotated[int, Meta(ge=1, description="what fits")] = 3 << 20
    glossy: Annotated[bool, Meta(description="shine")] = True
    walls: Annotated[tuple[int, ...], Meta(description="which walls [default: all]")] = ()
    name: Annotated[str | None, Meta(description="what to call it")] = None
    rooms: Annotated[tuple[str, ...], Meta(description="a room")] = ()
    under: Annotated[Colour | None, Meta(description="colour below")] = None
    max_coats: Annotated[int | None, Meta(description="most of them")] = None


def paint(*arguments: str) -> tuple[Paint | None, Result]:
    made: list[Paint] = []

    @click.command()
    @flags_of(Paint)
    def command(**values: object) -> None:
        made.append(build(Paint, values))

    result = CliRunner().invoke(command, arguments)
    return (made[0] if made else None), result


def test_without_flags_the_struct_has_its_defaults():
    assert paint()[0] == Paint()


def test_a_tuple_of_texts_is_a_flag_that_may_be_repeated():
    made, _ = paint("--rooms", "hall", "--rooms", "bath")
    assert made == Paint(rooms=("hall", "bath"))
    assert "--rooms TEXT" in paint("--help")[1].output


def test_each_kind_of_field_has_its_kind_of_flag():
    arguments = "--colour light-red --num-coats 9 --wait-s 0.5 --bucket 2GiB --no-glossy --walls 0,2-4 --name x"
    made, _ = paint(*arguments.split(), "--max-coats", "7")
    assert made == Paint(
        colour=Colour.LIGHT_RED,
        num_coats=9,
        wait_s=0.5,
        bucket_bytes=2 << 30,
        glossy=False,
        walls=(0, 2, 3, 4),
        name="x",
        max_coats=7,
    )


@pytest.mark.parametrize(
    "arguments",
    ["--num-coats 0", "--num-coats 10", "--num-coats x", "--wait-s 0", "--colour red", "--bucket 2XB", "--walls 1-"],
)
def test_bad_values_are_refused_with_flag_and_value(arguments):
    made, result = paint(*arguments.split())
    flag, value = arguments.split()
    assert made is None
    assert result.exit_code == 2
    assert flag in result.output
    assert value in result.output


def test_the_help_has_descriptions_bounds_and_defaults():
    text = " ".join(paint("--help")[1].output.split())
    assert "--num-coats N How often. [default: 2; 1<=x<=9]" in text
    assert "[default: 3MiB]" in text
    assert "--glossy / --no-glossy Shine." in text
    assert "Which walls [default: all]." in text


@pytest.mark.parametrize("kind", REAL)
def test_every_real_setting_has_a_flag_that_explains_itself(kind):
    @click.command()
    @flags_of(kind)
    def command(**values: object) -> None:
        assert build(kind, values) == kind()

    assert CliRunner().invoke(command, []).exit_code == 0
    options = {option.name: option for option in command.params}
    assert set(options) == set(kind.__struct_fields__) - NOT_FLAGS
    assert all(len(option.help) > 10 for option in options.values())


def test_no_two_real_settings_have_the_same_flag():
    flags = [flag_name(field) for kind in REAL for field in kind.__struct_fields__]
    assert len(flags) == len(set(flags))


def test_what_only_the_struct_can_refuse_is_a_configuration_error():
    with pytest.raises(ConfigurationError, match="num_coats"):
        build(Paint, {"num_coats": 100})


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("123", 123),
        ("1K", 1024),
        ("1kb", 1000),
        ("2GiB", 2 << 30),
        ("2gib", 2 << 30),
        ("0.5 MiB", 1 << 19),
        ("1GB", 10**9),
        ("3T", 3 << 40),
        ("7B", 7),
    ],
)
def test_sizes(text, num_bytes):
    assert ByteSize().convert(text, None, None) == num_bytes


@given(st.integers(0, 1023), st.sampled_from([0, 10, 20, 30, 40]))
def test_a_round_size_survives_being_written_and_read(number, shift):
    assert ByteSize().convert(format_bytes(number << shift), None, None) == number << shift


@given(st.lists(st.integers(0, 300), min_size=1, max_size=20))
def test_lists_of_integers(numbers):
    assert IntegerList().convert(",".join(map(str, numbers)), None, None) == tuple(numbers)


@pytest.mark.parametrize("text", ["0-99999999999", "5-2", "0-9" * 2, "-1", "", "70000", "a"])
def test_what_is_no_list_of_integers_is_refused(text):
    with pytest.raises(click.BadParameter):
        IntegerList().convert(text, None, None)


@pytest.mark.parametrize("text", ["9" * 400, "99999999TiB", "nan", "inf", "-1GiB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(click.BadParameter):
        ByteSize().convert(text, None, None)


@given(st.lists(st.integers(0, 300), max_size=40, unique=True).map(sorted))
def test_lists_of_integers_survive_being_written_and_read(numbers):
    written = format_ranges(numbers)
    assert list(IntegerList().convert(written, None, None) if numbers else ()) == numbers


def test_lists_of_integers_are_written_short():
    assert format_ranges(range(2, 100)) == "2-99"
    assert format_ranges([0, 1, 4, 5, 6, 9]) == "0,1,4-6,9"


def test_sizes_are_written_in_the_unit_that_suits():
    assert [format_bytes(1 << shift) for shift in (0, 10, 20, 30, 40)] == ["1B", "1KiB", "1MiB", "1GiB", "1TiB"]
    assert format_bytes((1 << 40) - 65536) == "1TiB"
