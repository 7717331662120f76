"""Grammars of answers that have to call tools, or to be of a form after the model has thought."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from disagg.models.tool_calls.syntax import ARGUMENTS_MARK, SYNTAX, AnswerSyntax, ReasoningTags, ToolCallFormat

MAX_CALLS: Final = 16
"""Calls that one answer can be made to have: a small model would never end them."""

_COMMA: Final = '", "'

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
    written = _Written(syntax, tools, control_token)
    begin, call = written.begin, " | ".join(written.calls)
    start = {
        ToolCallFormat.HERMES: _calls(r'"\n"', parallel),
        ToolCallFormat.LLAMA3_JSON: _calls('"; "', parallel),
        ToolCallFormat.MISTRAL: f'{begin} "[" {_calls(_COMMA, parallel)} "]"',
        ToolCallFormat.MISTRAL_ARGS: _calls("", parallel),
    }[written.form]
    if written.form in (ToolCallFormat.HERMES, ToolCallFormat.MISTRAL_ARGS):
        call = f"{begin} ({call})"
    return [{"lark_grammar": f"start: {start}\ncall: {call}"}, *written.arguments]


def free_calls(
    syntax: AnswerSyntax, tools: Sequence[CallableTool], control_token: ControlToken, *, parallel: bool
) -> list[Part] | None:
    """Return the grammar of answers that are text, in which what begins as a call is one of ``tools``.

    None for a form whose calls no mark begins.
    """
    written = _Written(syntax, tools, control_token)
    if written.form is ToolCallFormat.LLAMA3_JSON:
        return None
    mark = SYNTAX[written.form].begin
    is_control = control_token(mark) is not None
    opened = f"opened: TEXT {written.begin}" if is_control else f"opened[lazy]: TEXT {_quoted(mark)}"
    in_list = written.form is ToolCallFormat.MISTRAL
    body = f'"[" {_calls(_COMMA, parallel)} "]"' if in_list else "call"
    times = "*" if parallel and not in_list else "?"
    lark = f"start: (opened {body}){times} TEXT\n{opened}\ncall: {' | '.join(written.calls)}\nTEXT: /(.|\\n)*/"
    return [{"lark_grammar": lark}, *written.arguments]


class _Written:
    """The parts of a form: what begins a call, the calls of each tool after it, and the grammars of their arguments."""

    def __init__(self, syntax: AnswerSyntax, tools: Sequence[CallableTool], control_token: ControlToken) -> None:
        assert syntax.calls is not None, "calls in a form that is not known"
        self.form = syntax.calls
        marks = SYNTAX[self.form]
        self.begin = _mark(marks.begin, control_token)
        end, divider = _mark(marks.end, control_token), _mark(ARGUMENTS_MARK, control_token)
        if self.form is ToolCallFormat.MISTRAL_ARGS:
            heads = [f"{_quoted(tool.name)} {divider}" for tool in tools]
            self.calls = [f"{head} @arguments_{index}" for index, head in enumerate(heads)]
        else:
            heads = [_head(tool.name, marks.arguments_key) for tool in tools]
            self.calls = [f'{head} @arguments_{index} "}}"' for index, head in enumerate(heads)]
        if self.form is ToolCallFormat.HERMES:
            self.calls = [f'"\\n" {call} "\\n" {end}' for call in self.calls]
        self.arguments = [{**tool.arguments, "name": f"arguments_{index}"} for index, tool in enumerate(tools)]


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
