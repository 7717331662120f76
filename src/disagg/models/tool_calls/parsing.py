"""From an answer's text, as it comes, to what a client sees: reasoning, content, and calls of tools."""

import enum
import secrets
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from disagg.models.tool_calls.json_reader import CallReader, ValueReader
from disagg.models.tool_calls.syntax import SYNTAX, ReasoningTags, ToolCallFormat

_ID_CHARACTERS: Final = string.ascii_letters + string.digits
_ID_LENGTH: Final = 9
"""Mistral's templates take ids of this length alone."""


class PieceKind(enum.Enum):
    """What a piece of an answer is."""

    CONTENT = "content"
    REASONING = "reasoning"
    CALL = "call"
    """A call begins: ``text`` is the tool's name."""
    ARGUMENTS = "arguments"
    """More of the arguments of call ``index``, which are JSON."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of an answer. ``index`` numbers its calls."""

    kind: PieceKind
    text: str
    index: int = 0
    call_id: str = ""


class _Reader(Protocol):
    def push(self, text: str) -> list[Piece]:
        """Take more text and return what it shows."""

    def finish(self) -> list[Piece]:
        """Return what was held back, at the answer's end."""


_State = Callable[[], list[Piece] | None]
"""What a reader does with the text that waits: it returns pieces, or None when it needs more text."""


class AnswerParser:
    """Reads one answer. ``num_calls`` are the calls so far.

    ``calls`` is None where no tools were given. ``is_thinking``: the prompt has opened the reasoning already.
    """

    def __init__(
        self, calls: ToolCallFormat | None, reasoning: ReasoningTags | None, *, is_thinking: bool = False
    ) -> None:
        self._calls = _CallParser(calls) if calls is not None else None
        self._thoughts = _ThoughtParser(reasoning, is_thinking) if reasoning is not None else None

    @property
    def num_calls(self) -> int:
        """Calls that have begun."""
        return self._calls.num_calls if self._calls is not None else 0

    def push(self, text: str, *, is_last: bool = False) -> list[Piece]:
        """Return what more text shows; with ``is_last`` what was held back, too."""
        pieces = self._pushed(self._thoughts, [Piece(PieceKind.CONTENT, text)], is_last)
        return self._pushed(self._calls, pieces, is_last)

    @staticmethod
    def _pushed(reader: _Reader | None, pieces: list[Piece], is_last: bool) -> list[Piece]:
        if reader is None:
            return [piece for piece in pieces if piece.text]
        shown: list[Piece] = []
        for piece in pieces:
            shown += reader.push(piece.text) if piece.kind is PieceKind.CONTENT else [piece]
        return shown + (reader.finish() if is_last else [])


class _ThoughtParser:
    """Tells reasoning from content, a state for each place. White space around reasoning is nobody's."""

    def __init__(self, tags: ReasoningTags, is_thinking: bool) -> None:
        self._tags = tags
        self._held = ""
        self._state: _State = self._at_thought if is_thinking else self._before

    def push(self, text: str) -> list[Piece]:
        """See _Reader."""
        self._held += text
        return _run(lambda: self._state())

    def finish(self) -> list[Piece]:
        """See _Reader."""
        kind = PieceKind.CONTENT if self._state in (self._before, self._content) else PieceKind.REASONING
        held, self._held = self._held.rstrip() if kind is PieceKind.REASONING else self._held, ""
        return [Piece(kind, held)] if held else []

    def _before(self) -> list[Piece] | None:
        start = self._held.lstrip()
        if len(start) < len(self._tags.begin) and self._tags.begin.startswith(start):
            return None
        thinks = start.startswith(self._tags.begin)
        self._held = start[len(self._tags.begin) :] if thinks else self._held
        self._state = self._at_thought if thinks else self._content
        return []

    def _at_thought(self) -> list[Piece] | None:
        return self._skip_space(self._thought)

    def _thought(self) -> list[Piece] | None:
        before, found, after = self._held.partition(self._tags.end)
        num_held = 0 if found else _overlap(before, self._tags.end)
        shown = before[: len(before) - num_held].rstrip()
        self._held = after if found else self._held[len(shown) :]
        if found:
            self._state = self._at_content
        return [Piece(PieceKind.REASONING, shown)] if shown else [] if found else None

    def _at_content(self) -> list[Piece] | None:
        return self._skip_space(self._content)

    def _content(self) -> list[Piece] | None:
        shown, self._held = self._held, ""
        return _content(shown) or None

    def _skip_space(self, state: "_State") -> list[Piece] | None:
        self._held = self._held.lstrip()
        if not self._held:
            return None
        self._state = state
        return []


class _CallParser:
    """Tells calls from content: a state for each place in the syntax, which takes the text that waits."""

    def __init__(self, calls: ToolCallFormat) -> None:
        self._format = calls
        self._syntax = SYNTAX[calls]
        self._state: _State = self._at_start if calls is ToolCallFormat.LLAMA3_JSON else self._outside
        self._held = ""
        self._raw = ""
        self._call = CallReader()
        self._arguments = ValueReader()
        self.num_calls = 0
        self._num_done = 0

    def push(self, text: str) -> list[Piece]:
        """See _Reader."""
        self._held += text
        return _run(lambda: self._state())

    def finish(self) -> list[Piece]:
        """Return what turned out to be no call."""
        is_inside = self._is_named or self._state == self._after_tagged
        text = "" if is_inside else self._raw + self._held
        self._raw = self._held = ""
        return [Piece(PieceKind.CONTENT, text)] if text.strip() or (text and not self.num_calls) else []

    @property
    def _is_named(self) -> bool:
        """Whether a call is open that the client knows of."""
        return self.num_calls > self._num_done

    def _outside(self) -> list[Piece] | None:
        """Look for what begins a call. White space before one is held back, since it is not the answer's."""
        before, found, after = self._held.partition(self._syntax.begin)
        if found:
            content = before.rstrip()
            self._held = after
            self._begin(before[len(content) :] + found)
            return _content(content)
        num_held = _overlap(before, self._syntax.begin)
        shown = before[: len(before) - num_held].rstrip()
        self._held = self._held[len(shown) :]
        return _content(shown) or None

    def _at_start(self) -> list[Piece] | None:
        """A call is there if the answer begins with a brace, or with the tag before one."""
        start = self._held.lstrip()
        begin = self._syntax.begin
        if len(start) < len(begin) and begin.startswith(start):
            return None
        if start.startswith(begin):
            start = start[len(begin) :].lstrip()
            if not start:
                return None
        if start.startswith("{"):
            self._held = start
            self._begin("")
            return []
        self._state = self._plain
        return []

    def _plain(self) -> list[Piece] | None:
        shown, self._held = self._held, ""
        return _content(shown) or None

    def _begin(self, raw: str) -> None:
        """Read a call; ``raw`` and what follows is content if it is none."""
        self._raw = raw
        self._call, self._arguments = CallReader(), ValueReader()
        named = self._format is ToolCallFormat.MISTRAL_ARGS
        in_list = self._format is ToolCallFormat.MISTRAL
        self._state = self._in_name if named else self._before_item if in_list else self._in_call

    def _before_item(self) -> list[Piece] | None:
        """In a list of calls, before the next."""
        rest = self._held.lstrip()
        if not rest:
            return None
        if rest[0] == "{":
            self._state = self._in_call
        elif rest[0] in "[,":
            num_read = len(self._held) - len(rest) + 1
            self._raw, self._held = self._raw + self._held[:num_read], self._held[num_read:]
        elif rest[0] == "]":
            self._held = rest[1:]
            self._state = self._after_list
        else:
            self._give_up()
        return []

    def _after_list(self) -> list[Piece] | None:
        self._raw, self._held = "", self._held.lstrip()
        self._state = self._outside
        return []

    def _in_name(self) -> list[Piece] | None:
        """``name[ARGS]{...}``: the name, and what else there is before the brace."""
        head, found, after = self._held.partition("{")
        if not found:
            return None
        self._held = found + after
        self._state = self._in_arguments
        return self._call_begins(head.split("[")[0].strip())

    def _in_arguments(self) -> list[Piece] | None:
        for position, character in enumerate(self._held, start=1):
            self._arguments.push(character)
            if self._arguments.is_done:
                pieces = self._more(self._held[:position])
                self._held = self._held[position:]
                self._end()
                return pieces
        shown, self._held = self._held, ""
        return self._more(shown) or None

    def _in_call(self) -> list[Piece] | None:
        """A call as an object."""
        if not self._held:
            return None
        pieces: list[Piece] = []
        arguments, num_read = "", 0
        while num_read < len(self._held) and not (self._call.is_done or self._call.has_failed):
            arguments += self._call.push(self._held[num_read])
            num_read += 1
            if self._call.name and not self._is_named:
                pieces += self._call_begins(self._call.name)
        self._raw += self._held[:num_read]
        self._held = self._held[num_read:]
        pieces += self._more(arguments)
        if self._call.has_failed and not self._is_named:
            self._give_up()
        elif self._call.is_done or self._call.has_failed:
            self._end()
        return pieces

    def _give_up(self) -> None:
        self._held, self._raw = self._raw + self._held, ""
        self._state = self._given_up

    def _given_up(self) -> list[Piece] | None:
        """What looked like a call is content, up to where another may begin."""
        begin = self._syntax.begin
        length = max(self._held.find(begin), 0) + len(begin)
        shown, self._held = self._held[:length], self._held[length:]
        self._state = self._plain if self._format is ToolCallFormat.LLAMA3_JSON else self._outside
        return _content(shown)

    def _end(self) -> None:
        """A call is over."""
        self._raw = ""
        self._num_done = self.num_calls
        self._state = {
            ToolCallFormat.HERMES: self._after_tagged,
            ToolCallFormat.LLAMA3_JSON: self._after_plain,
            ToolCallFormat.MISTRAL: self._next_item,
            ToolCallFormat.MISTRAL_ARGS: self._outside,
        }[self._format]

    def _after_tagged(self) -> list[Piece] | None:
        """Pass over the closing tag."""
        rest = self._held.lstrip()
        if len(rest) < len(self._syntax.end) and self._syntax.end.startswith(rest):
            return None
        self._held = rest.removeprefix(self._syntax.end)
        self._state = self._outside
        return []

    def _after_plain(self) -> list[Piece] | None:
        """After a call without tags another may come."""
        self._held = self._held.lstrip("; \t\r\n")
        if not self._held:
            return None
        self._state = self._at_start
        return []

    def _next_item(self) -> list[Piece] | None:
        self._call = CallReader()
        self._state = self._before_item
        return []

    def _call_begins(self, name: str) -> list[Piece]:
        self.num_calls += 1
        return [Piece(PieceKind.CALL, name, self.num_calls - 1, new_call_id())]

    def _more(self, arguments: str) -> list[Piece]:
        return [Piece(PieceKind.ARGUMENTS, arguments, self.num_calls - 1)] if arguments else []


def new_call_id() -> str:
    """Return an id that every template takes."""
    return "".join(secrets.choice(_ID_CHARACTERS) for _ in range(_ID_LENGTH))


def joined(pieces: Sequence[Piece], kind: PieceKind) -> str:
    """Return the text of all pieces of a kind."""
    return "".join(piece.text for piece in pieces if piece.kind is kind)


def _run(state: _State) -> list[Piece]:
    pieces: list[Piece] = []
    while (shown := state()) is not None:
        pieces += shown
    return pieces


def _content(text: str) -> list[Piece]:
    return [Piece(PieceKind.CONTENT, text)] if text else []


def _overlap(text: str, mark: str) -> int:
    """Return the length of the longest end of ``text`` that begins ``mark``."""
    return next((size for size in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:size])), 0)
