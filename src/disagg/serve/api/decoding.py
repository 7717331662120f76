"""Bodies to requests: every refusal names the field, the value and what would do."""

import re
from typing import Any, Final, TypeVar

import msgspec

from disagg.base.errors import InvalidRequestError

Body = TypeVar("Body", bound=msgspec.Struct)

_PATH: Final = re.compile(r"^(?P<what>.*?) - at `\$(?P<path>.*)`$", re.DOTALL)
_UNKNOWN: Final = re.compile(r"^Object contains unknown field `(?P<name>.*?)`")
_MISSING: Final = re.compile(r"^Object missing required field `(?P<name>.*?)`")
_STEP: Final = re.compile(r"\.(?P<name>\w+)|\[(?P<index>\d+|\.\.\.)\]")
_MAX_SHOWN: Final = 80


def decode_body(data: bytes, kind: type[Body]) -> Body:
    """Decode a JSON body by schema. Raises InvalidRequestError naming field and value."""
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise _refusal(str(error), data) from None
    except msgspec.DecodeError as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequestError(f"the body cannot be read: {error}") from None


def _refusal(message: str, data: bytes) -> InvalidRequestError:
    match = _PATH.match(message)
    what, path = (match["what"], match["path"]) if match else (message, "")
    name = path.lstrip(".")
    if unknown := _UNKNOWN.match(what):
        field = _join(name, unknown["name"])
        return InvalidRequestError(f"unknown parameter '{field}': it is not supported and would be ignored", field)
    if missing := _MISSING.match(what):
        field = _join(name, missing["name"])
        return InvalidRequestError(f"missing parameter '{field}'", field)
    if not name:
        return InvalidRequestError(f"the body must be a JSON object: {what}")
    what = what[0].lower() + what[1:].replace("`", "")
    return InvalidRequestError(f"'{name}': {what}{_shown(data, path)}", name.split(".")[0].split("[")[0])


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _shown(data: bytes, path: str) -> str:
    """Return the offending value, cut short, when the path leads to exactly one."""
    value: Any = msgspec.json.decode(data)
    for step in _STEP.finditer(path):
        try:
            value = value[step["name"]] if step["name"] else value[int(step["index"])]
        except (KeyError, IndexError, TypeError, ValueError):
            return ""
    text = msgspec.json.encode(value).decode()
    return f", got {text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + '...'}"
