"""Grammars of answers that have to call tools, or to be of a form after the model has thought."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from disagg.models.tool_calls.syntax import ARGUMENTS_MARK, SYNTAX, AnswerSyntax, ReasoningTags, ToolCallFormat

MAX_CALLS: Final = 16
"""Calls that one answer can be made to have: a small model would never end them."""

Part = dict[str, Any]
"""One grammar of llguidance's list: with ``json_schema`` or ``lark_grammar``, and a ``name`` for others to refer to."""
ControlToken = Callable[[str], int | None]
"""Returns the control token that is written so, None where the text has none."""


@dataclass(frozen=True, slots=True)
class CallableTool:
    """A tool by name, and the grammar of its arguments."""

    name: str
    arguments: Part


def forced_calls(
    syntax: AnswerSyntax, tools: Sequence[CallableTool], control_token: ControlToken, *, parallel: bool
) -> list[Part]:
    """Return the grammar of answers that are calls of some of ``tools``; the first part refers to the others."""
    assert syntax.calls is not None, "calls in a form that is not known"
    marks = SYNTAX[syntax.calls]
    begin, end, arguments = (_mark(text, control_token) for text in (marks.begin, marks.end, ARGUMENTS_MARK))
    heads = [_head(tool.name, marks.arguments_key) for tool in tools]
    objects = [f'{head} @arguments_{index} "}}"' for index, head in enumerate(heads)]
    named = [f"{_quoted(tool.name)} {arguments} @arguments_{index}" for index, tool in enumerate(tools)]
    tagged = [f'{begin} "\\n" {one} "\\n" {end}' for one in objects]
    start, calls = {
        ToolCallFormat.HERMES: (_calls(r'"\n"', parallel), tagged),
        ToolCallFormat.LLAMA3_JSON: (_calls('"; "', parallel), objects),
        ToolCallFormat.MISTRAL: (" ".join((begin, '"["', _calls('", "', parallel), '"]"')), objects),
        ToolCallFormat.MISTRAL_ARGS: (_calls("", parallel), [f"{begin} {one}" for one in named]),
    }[syntax.calls]
    lark = f"start: {start}\ncall: {' | '.join(calls)}"
    rest = [{**tool.arguments, "name": f"arguments_{index}"} for index, tool in enumerate(tools)]
    return [{"lark_grammar": lark}, *rest]


def either(answer: Part, calls: Sequence[Part]) -> list[Part]:
    """Return the grammar of answers that are ``answer`` or ``calls``, whichever the model chooses."""
    first, *rest = calls
    return [{"lark_grammar": "start: @plain | @calls"}, {**answer, "name": "plain"}, {**first, "name": "calls"}, *rest]


def after_thinking(
    tags: ReasoningTags, parts: Sequence[Part], control_token: ControlToken, *, is_thinking: bool
) -> list[Part]:
    """Return the grammar of answers that may begin with reasoning and are ``parts`` after it.

    ``is_thinking``: the prompt has opened the reasoning, so that it has to be closed.
    """
    begin, end = (control_token(tag) for tag in (tags.begin, tags.end))
    # Without a control token for its end, reasoning ends at the first place where the tag is spelled.
    thoughts = f"thought: TEXT <[{end}]>\n" if end is not None else f"thought[lazy]: TEXT {_quoted(tags.end)}\n"
    opened = f"<[{begin}]>" if begin is not None else _quoted(tags.begin)
    thinking = "thought SPACE?" if is_thinking else f"({opened} thought SPACE?)?"
    lark = f"start: {thinking} @answer\n{thoughts}TEXT: /(.|\\n)*/\nSPACE: /\\n{{1,4}}/"
    first, *rest = parts
    return [{"lark_grammar": lark}, {**first, "name": "answer"}, *rest]


def _head(name: str, arguments_key: str) -> str:
    """Return what precedes the arguments, in the lexemes that JSON has: the lexer never goes back to a shorter one."""
    written = ("{", '"name"', ":", " ", f'"{name}"', ",", " ", f'"{arguments_key}"', ":", " ")
    return " ".join(map(_quoted, written))


def _calls(separator: str, parallel: bool) -> str:
    return f"call ({separator} call){{0,{MAX_CALLS - 1}}}" if parallel else "call"


def _mark(text: str, control_token: ControlToken) -> str:
    token_id = control_token(text) if text else None
    return _quoted(text) if token_id is None else f"<[{token_id}]>"


def _quoted(text: str) -> str:
    return json.dumps(text)
