"""Bodies to requests: every refusal names the field, the value and what would do."""

import re
from collections.abc import Mapping
from typing import Any, Final, TypeVar

import msgspec

from disagg.base.errors import InvalidRequestError
from disagg.serve.api.schema import IGNORED, NEUTRAL, NEUTRAL_IN_MESSAGES, UNUSED_WITH_NONE, ChatMessage, StreamOptions

Body = TypeVar("Body", bound=msgspec.Struct)

_PATH: Final = re.compile(r"^(?P<what>.*?) - at `(?:key` in `)?\$(?P<path>.*)`$", re.DOTALL)
_UNKNOWN: Final = re.compile(r"^Object contains unknown field `(?P<name>.*?)`")
_MISSING: Final = re.compile(r"^Object missing required field `(?P<name>.*?)`")
_STEP: Final = re.compile(r"\.(?P<name>\w+)|\[(?P<index>\d+|\.\.\.)\]")
_MAX_SHOWN: Final = 80
_NULL: Final = msgspec.Raw(b"null")
_NONE: Final = msgspec.Raw(b'"none"')
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])


def decode_body(data: bytes, kind: type[Body]) -> Body:
    """Decode a JSON body by schema.

    Raises InvalidRequestError naming field and value; also for a field that is not in the schema, unless it is
    known never to change an answer, is null, or has the value that stands for not using it.
    """
    try:
        fields = _fields.decode(data)
        for name in fields.keys() - set(kind.__struct_fields__) - IGNORED:
            _check_unused(name, fields)
        return _decode(data, kind)
    except msgspec.ValidationError as error:
        raise _refusal(str(error), data) from None
    except msgspec.DecodeError as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequestError(f"the body cannot be read: {error}") from None


def _decode(data: bytes, kind: type[Body]) -> Body:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        if not _UNKNOWN.match(str(error)):
            raise
        return msgspec.convert(_without_unused(msgspec.json.decode(data)), kind)


def _without_unused(body: dict[str, Any]) -> dict[str, Any]:
    """Return a body without the fields inside of its fields that stand for not using them."""
    messages, options = body.get("messages"), body.get("stream_options")
    if isinstance(messages, list):
        known = ChatMessage.__struct_fields__
        body["messages"] = [_used(message, known, NEUTRAL_IN_MESSAGES) for message in messages]
    if options is not None:
        body["stream_options"] = _used(options, StreamOptions.__struct_fields__, {})
    return body


def _used(value: object, known: tuple[str, ...], neutral: Mapping[str, tuple[object, ...]]) -> object:
    if not isinstance(value, dict):
        return value
    return {
        name: one for name, one in value.items() if name in known or not (one is None or one in neutral.get(name, ()))
    }


def _check_unused(name: str, fields: Mapping[str, msgspec.Raw]) -> None:
    if fields[name] == _NULL or (name in UNUSED_WITH_NONE and fields.get(UNUSED_WITH_NONE[name]) == _NONE):
        return
    if name not in NEUTRAL:
        raise InvalidRequestError(f"unknown parameter '{name}': this server does not have it, leave it out", name)
    value = msgspec.json.decode(fields[name])
    if value in NEUTRAL[name]:
        return
    remedy = " or ".join(["leave it out", *(f"give {_abridged(neutral)}" for neutral in NEUTRAL[name])])
    raise InvalidRequestError(f"'{name}' is not supported, got {_abridged(value)}: {remedy}", name)


def _refusal(message: str, data: bytes) -> InvalidRequestError:
    match = _PATH.match(message)
    what, path = (match["what"], match["path"]) if match else (message, "")
    name = path.lstrip(".")
    if unknown := _UNKNOWN.match(what):
        field = _join(name, unknown["name"])
        return InvalidRequestError(f"unknown parameter '{field}': this server does not have it, leave it out", field)
    if missing := _MISSING.match(what):
        field = _join(name, missing["name"])
        return InvalidRequestError(f"missing parameter '{field}'", field)
    if not name:
        return InvalidRequestError(f"the body must be a JSON object: {what.replace('`', '')}")
    what = what[0].lower() + what[1:].replace("`", "")
    return InvalidRequestError(f"'{name}': {what}{_shown(data, path)}", name.split(".")[0].split("[")[0])


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _shown(data: bytes, path: str) -> str:
    """Return the offending value, cut short, when the path leads to exactly one."""
    try:
        value: Any = msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return ""
    for step in _STEP.finditer(path):
        try:
            value = value[step["name"]] if step["name"] else value[int(step["index"])]
        except (KeyError, IndexError, TypeError, ValueError):
            return ""
    return f", got {_abridged(value)}"


def _abridged(value: object) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."
