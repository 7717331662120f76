"""Structs from YAML files, with errors that say the file, the place in it, and what may stand there."""

import re
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
import yaml
from msgspec import inspect

from disagg.base.errors import ConfigurationError

S = TypeVar("S", bound=msgspec.Struct)

_UNKNOWN: Final = re.compile(r"(?:unknown field|Invalid enum value) .*?(?: - at `\$(.*)`)?")
_STEP: Final = re.compile(r"\.(\w+)|\[(?:\d+|\.\.\.)\]")


def read_yaml(file: Path, kind: type[S], what: str) -> S:
    """Read a ``what``, such as a placement. Raises ConfigurationError when the file cannot be read or holds none."""
    try:
        return msgspec.convert(yaml.safe_load(file.read_text(encoding="utf-8")), kind)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"cannot read the {what} {file}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{file} is not a {what}: {error}") from error
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"{file} is not a {what}: {error}{_known(kind, str(error))}") from error
    except ConfigurationError as error:
        raise ConfigurationError(f"{file}: {error}") from error


def _known(kind: type, message: str) -> str:
    """Return what may stand where an unknown field or an unknown word stands; nothing for other errors."""
    match = re.search(_UNKNOWN.pattern + "$", message)
    if match is None:
        return ""
    here = [inspect.type_info(kind)]
    for step in _STEP.finditer(match[1] or ""):
        here = [inner for outer in here for inner in _inside(outer, step[1])]
    names: list[Any] = []
    for found in here:
        if isinstance(found, inspect.StructType):
            names += [field.encode_name for field in found.fields]
        elif isinstance(found, inspect.EnumType):
            names += [member.value for member in found.cls]
    return f"; there are {', '.join(map(str, names))}" if names else ""


def _inside(outer: inspect.Type, name: str | None) -> list[inspect.Type]:
    """Return the types of a field, or of the items where ``name`` is None; unions are opened."""
    if isinstance(outer, inspect.StructType) and name is not None:
        inner = [field.type for field in outer.fields if field.encode_name == name]
    elif isinstance(outer, inspect.VarTupleType | inspect.ListType):
        inner = [outer.item_type]
    elif isinstance(outer, inspect.DictType):
        inner = [outer.value_type]
    else:
        return []
    opened: list[inspect.Type] = []
    for one in inner:
        found = one.type if isinstance(one, inspect.Metadata) else one
        opened += found.types if isinstance(found, inspect.UnionType) else [found]
    return opened
