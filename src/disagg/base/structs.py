"""From parsed YAML or JSON to structs, with words that help where it does not fit."""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, Final, TypeVar

import msgspec
from msgspec import inspect

from disagg.base.errors import ConfigurationError
from disagg.base.known_names import known_names

T = TypeVar("T")

_PLACE: Final = re.compile(r" - at `(\$.*)`$")
_STEP: Final = re.compile(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]")
_NAME: Final = re.compile(r"unknown field `(.*?)`|Invalid (?:enum )?value '(.*?)'")


def read_struct(data: object, kind: type[T]) -> T:
    """Return parsed YAML or JSON as ``kind``.

    Raises ConfigurationError, with the place in ``data`` and the names known there, when it does not fit; and for a
    number that is not finite, which YAML can write.
    """
    try:
        value = msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise ConfigurationError(explain(error, data, kind)) from error
    except OverflowError as error:
        raise ConfigurationError(f"a number is too large: {error}") from error
    for place, number in _floats(data, "$"):
        if not math.isfinite(number):
            raise ConfigurationError(f"{number} at `{place}` is no finite number")
    return value


def explain(error: msgspec.ValidationError, data: object, kind: Any) -> str:
    """Return what msgspec says of ``data``, and the known names where it met one that it does not know."""
    words = str(error)
    name, place = _NAME.search(words), _PLACE.search(words)
    if name is None:
        return words
    steps = [field or index for field, index in _STEP.findall(place[1])] if place else []
    found = _known_at(inspect.type_info(kind), data, steps, is_field=name[1] is not None)
    return f"{words}; {known_names(name[1] or name[2], found)}" if found else words


def _floats(data: object, place: str) -> Iterator[tuple[str, float]]:
    match data:
        case float():
            yield place, data
        case dict():
            for key, value in data.items():
                yield from _floats(value, f"{place}.{key}")
        case list():
            for index, value in enumerate(data):
                yield from _floats(value, f"{place}[{index}]")


def _known_at(kind: inspect.Type | None, data: Any, steps: Sequence[str], *, is_field: bool) -> list[str]:
    """Return the names of the fields, or else the values, that are known at a place; none where that is unclear."""
    for step in steps:
        members = _members(kind, data)
        tags = [str(one.tag) for one in members if isinstance(one, inspect.StructType) and one.tag_field == step]
        if tags:
            return tags
        kind = _inside(members[0], step) if len(members) == 1 else None
        data = _item(data, step)
    match _members(kind, data):
        case [inspect.StructType(fields=fields, tag_field=tag)] if is_field:
            return [*([tag] if tag else []), *(field.encode_name for field in fields)]
        case [inspect.EnumType(cls=cls)]:
            return [str(member.value) for member in cls]
        case [inspect.LiteralType(values=values)]:
            return [str(value) for value in values]
    return []


def _members(kind: inspect.Type | None, data: Any) -> list[inspect.Type]:
    """Return what may be there: of a union without None the struct whose tag ``data`` has, else all."""
    while isinstance(kind, inspect.Metadata):
        kind = kind.type
    if kind is None or not isinstance(kind, inspect.UnionType):
        return [] if kind is None else [kind]
    members = [one for member in kind.types for one in _members(member, data) if not isinstance(one, inspect.NoneType)]
    return [one for one in members if _has_tag(one, data)] or members


def _has_tag(kind: inspect.Type, data: Any) -> bool:
    return isinstance(kind, inspect.StructType) and kind.tag == _item(data, kind.tag_field)


def _inside(kind: inspect.Type, step: str) -> inspect.Type | None:
    match kind:
        case inspect.StructType(fields=fields):
            return next((field.type for field in fields if field.encode_name == step), None)
        case inspect.ListType(item_type=item) | inspect.VarTupleType(item_type=item):
            return item
        case inspect.DictType(value_type=value):
            return value
    return None


def _item(data: Any, step: str | None) -> Any:
    if isinstance(data, dict):
        return data.get(step)
    return data[int(step)] if isinstance(data, list) and step is not None and step.isdigit() else None
