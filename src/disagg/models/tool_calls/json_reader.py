"""JSON as it comes: one value, and one call of a tool, read character by character."""

import json
from typing import Final

_SPACE: Final = " \t\r\n"
_OPENING: Final = "{["
_CLOSING: Final = "}]"


class ValueReader:
    """Finds the end of one JSON value. What is inside of it is not checked."""

    def __init__(self) -> None:
        self._depth = 0
        self._kind = ""
        self._in_string = False
        self._escaped = False
        self.is_done = False

    def push(self, character: str) -> bool:
        """Take the next character; return whether it belongs to the value. White space before it belongs, too."""
        if self._in_string:
            self._push_in_string(character)
            return True
        if not self._kind:
            if character not in _SPACE:
                self._begin(character)
            return True
        if self._kind == "scalar":
            self.is_done = character in _SPACE or character in ",}]"
            return not self.is_done
        self._begin(character)
        return True

    def _begin(self, character: str) -> None:
        if character == '"':
            self._in_string = True
            self._kind = self._kind or "string"
        elif character in _OPENING:
            self._depth += 1
            self._kind = self._kind or "container"
        elif character in _CLOSING:
            self._depth -= 1
            self.is_done = self._depth <= 0
        else:
            self._kind = self._kind or "scalar"

    def _push_in_string(self, character: str) -> None:
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._in_string = False
            self.is_done = self._kind == "string"


class CallReader:
    """Reads ``{"name": ..., "arguments": {...}}``, giving the arguments out as they come.

    The members may have any order: arguments that come before the name are held until it is known. ``has_failed`` says
    that this is no call.
    """

    _ARGUMENTS: Final = ("arguments", "parameters")

    def __init__(self) -> None:
        self.name = ""
        self.is_done = False
        self.has_failed = False
        self._value: ValueReader | None = None
        self._text = ""
        self._key: str | None = None
        self._is_open = False
        self._held = ""

    def push(self, character: str) -> str:
        """Take the next character; return what may be given out of the arguments."""
        if self._value is None:
            self._push_between(character)
            return ""
        belongs = self._value.push(character)
        if belongs:
            self._text += character
        shown = self._show(character) if belongs else ""
        if self._value.is_done:
            shown += self._end_value()
            if not belongs:
                self._push_between(character)
        return shown

    def _push_between(self, character: str) -> None:
        if character in _SPACE or (character in ",:" and self._is_open):
            return
        if not self._is_open:
            self._is_open = character == "{"
            self.has_failed = not self._is_open
        elif character == "}":
            self.is_done = bool(self.name)
            self.has_failed = not self.name
        elif self._key is None and character != '"':
            self.has_failed = True
        else:
            self._value, self._text = ValueReader(), character
            self._value.push(character)
            self._held += character if self._is_raw_argument() else ""

    def _is_raw_argument(self) -> bool:
        """Whether a value is given out as it comes; one that is written as a string is read first."""
        return self._key in self._ARGUMENTS and not self._text.lstrip().startswith('"')

    def _show(self, character: str) -> str:
        if self._is_raw_argument():
            self._held += character
        return self._take_held()

    def _take_held(self) -> str:
        if not self.name:
            return ""
        held, self._held = self._held, ""
        return held

    def _end_value(self) -> str:
        text, self._value = self._text.strip(), None
        if self._key is None:
            self._key = _string(text)
            return ""
        key, self._key = self._key, None
        if key == "name":
            self.name = _string(text)
            self.has_failed = not self.name
        elif key in self._ARGUMENTS and text.startswith('"'):
            self._held += _string(text)
        return self._take_held()


def _string(text: str) -> str:
    """Return a JSON string, "" for anything else."""
    try:
        value = json.loads(text)
    except ValueError:
        return ""
    return value if isinstance(value, str) else ""
