"""Command-line flags out of configuration structs: the one place where a setting becomes a flag.

A field ``max_model_len`` becomes ``--max-model-len``, with help text and bounds from its ``Meta``. ``kv_memory_bytes``
becomes ``--kv-memory`` and takes sizes such as 2GiB; a bool becomes a pair ``--x / --no-x``; a tuple of integers takes
a list with ranges, 0,1,4-7; a tuple of strings is a flag that may be given several times.
"""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final, TypeVar

import click
import msgspec
from msgspec import inspect

from disagg.base.errors import ConfigurationError
from disagg.base.units import format_bytes, parse_bytes
from disagg.cli.values import Count, Name, Number

F = TypeVar("F", bound=Callable[..., Any])
S = TypeVar("S", bound=msgspec.Struct)

NOT_FLAGS: Final = frozenset({"objectives", "tells_costs", "tenants", "tenant_keys", "classes"})
"""Settings that commands work out, from other flags and from files."""
_MOST_INTEGERS: Final = 1 << 16
_METAVARS: Final = {inspect.IntType: "N", inspect.FloatType: "SECONDS", inspect.StrType: "TEXT"}
"""How a value is shown in the help; all our floats are seconds."""


class ByteSize(click.ParamType[int]):
    """A size: 536870912, 512MiB, 2GiB, 0.5G. K, M, ... and KiB, MiB, ... are powers of 1024, KB, MB, ... of 1000."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes."""
        if isinstance(value, int):
            return value
        try:
            return parse_bytes(str(value))
        except ConfigurationError as error:
            self.fail(str(error), param, ctx)


class IntegerList(click.ParamType[tuple[int, ...]]):
    """Integers with ranges: 0,1,4-7."""

    name = "list"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Return the integers."""
        if isinstance(value, tuple):
            return value
        numbers: list[int] = []
        for part in str(value).split(","):
            match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
            if match is None:
                self.fail(f"{value!r} is not a list of numbers such as 0,1,4-7", param, ctx)
            first, last = int(match[1]), int(match[2] or match[1])
            if not first <= last < _MOST_INTEGERS:
                self.fail(
                    f"{part.strip()!r} is no range from a lower to a higher number below {_MOST_INTEGERS}", param, ctx
                )
            numbers += range(first, last + 1)
        return tuple(numbers)


def flags_of(
    *kinds: type[msgspec.Struct], without: Collection[str] = (), environment: Mapping[str, str] | None = None
) -> Callable[[F], F]:
    """Give a command one option for each field of these structs, but for ``NOT_FLAGS`` and those in ``without``.

    The command receives the values by field name; ``build`` makes the structs of them. ``environment`` names the
    variables that may stand for a flag, for what should not show in a list of processes.
    """
    variables = environment or {}
    options = [
        _option(field, variables.get(field.name))
        for kind in kinds
        for field in inspect.type_info(kind).fields  # type: ignore[attr-defined]
        if field.name not in without and field.name not in NOT_FLAGS
    ]

    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def build(kind: type[S], values: Mapping[str, object]) -> S:
    """Return the struct made of those of ``values`` that are its fields. Raises ConfigurationError on a bad one."""
    chosen = {name: values[name] for name in kind.__struct_fields__ if name in values}
    try:
        return msgspec.convert(chosen, kind)
    except msgspec.ValidationError as error:
        raise ConfigurationError(str(error)) from error


def flag_name(field: str) -> str:
    """Return the flag of a field."""
    return "--" + field.removesuffix("_bytes").replace("_", "-")


def _option(field: inspect.Field, variable: str | None) -> Callable[[F], F]:
    kind, description = _unwrap(field.type)
    flag, default = flag_name(field.name), field.default
    arguments: dict[str, Any] = {"help": description[:1].upper() + description[1:] + "."}
    if isinstance(kind, inspect.VarTupleType) and isinstance(kind.item_type, inspect.StrType):
        arguments |= {"multiple": True, "metavar": "TEXT"}
        arguments["help"] += " May be given several times."
    elif isinstance(kind, inspect.BoolType):
        flag = f"{flag}/--no-{flag.removeprefix('--')}"
    else:
        arguments["type"] = _parameter_type(field.name, kind)
        arguments["metavar"] = None if field.name.endswith("_bytes") else _METAVARS.get(type(kind))
    if isinstance(kind, inspect.EnumType) and default is not None:
        default = default.value
    if field.name.endswith("_bytes") and default is not None:
        default = format_bytes(default)
    shown = default is not None and default != ()
    return click.option(
        flag,
        field.name,
        default=default,
        show_default=shown,
        envvar=variable,
        show_envvar=variable is not None,
        **arguments,
    )


def _parameter_type(name: str, kind: inspect.Type) -> click.ParamType[Any]:
    match kind:
        case inspect.IntType() if name.endswith("_bytes"):
            return ByteSize()
        case inspect.IntType():
            return Count(min=kind.ge, max=kind.le)
        case inspect.FloatType():
            return Number(min=kind.ge if kind.gt is None else kind.gt, max=kind.le, min_open=kind.gt is not None)
        case inspect.EnumType():
            return Name([member.value for member in kind.cls])
        case inspect.VarTupleType(item_type=inspect.IntType()):
            return IntegerList()
        case inspect.StrType():
            return click.STRING
        case _:
            raise TypeError(f"no flag can be made of the field {name} of type {kind}")


def _unwrap(kind: inspect.Type) -> tuple[inspect.Type, str]:
    """Return the type without ``Meta`` and ``| None``, and the description."""
    description = ""
    while True:
        match kind:
            case inspect.Metadata():
                description = str((kind.extra_json_schema or {}).get("description", description))
                kind = kind.type
            case inspect.UnionType():
                (kind,) = (member for member in kind.types if not isinstance(member, inspect.NoneType))
            case _:
                return kind, description
