"""The forms in which models write tool calls, and the tags between which they think.

Sources: the chat templates of Hermes 2 Pro, Qwen 2.5 and 3, Llama 3.1 to 3.3, Mistral (v3, v7, v11) and DeepSeek R1.
"""

import enum
from dataclasses import dataclass
from typing import Final


class ToolCallFormat(enum.Enum):
    """How a model writes the call of a tool. The values are vLLM's names."""

    HERMES = "hermes"
    """``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``: Hermes, Qwen, SmolLM3."""
    LLAMA3_JSON = "llama3_json"
    """``{"name": ..., "parameters": {...}}``, several divided by semicolons."""
    MISTRAL = "mistral"
    """``[TOOL_CALLS][{"name": ..., "arguments": {...}}]``."""
    MISTRAL_ARGS = "mistral_args"
    """``[TOOL_CALLS]name[ARGS]{...}``, since v11."""


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """What surrounds a call. ``begin`` is optional where calls are told by their brace alone."""

    begin: str
    end: str = ""
    arguments_key: str = "arguments"


SYNTAX: Final[dict[ToolCallFormat, CallSyntax]] = {
    ToolCallFormat.HERMES: CallSyntax("<tool_call>", "</tool_call>"),
    ToolCallFormat.LLAMA3_JSON: CallSyntax("<|python_tag|>", arguments_key="parameters"),
    ToolCallFormat.MISTRAL: CallSyntax("[TOOL_CALLS]"),
    ToolCallFormat.MISTRAL_ARGS: CallSyntax("[TOOL_CALLS]"),
}
ARGUMENTS_MARK: Final = "[ARGS]"


@dataclass(frozen=True, slots=True)
class ReasoningTags:
    """The tags between which a model thinks before it answers."""

    begin: str
    end: str


REASONING_TAGS: Final = (ReasoningTags("<think>", "</think>"), ReasoningTags("[THINK]", "[/THINK]"))


@dataclass(frozen=True, slots=True)
class AnswerSyntax:
    """How one model writes its answers. ``calls`` is None where that is not known.

    ``describes_tools`` is false for a template without a place for tools: they are described in a system message.
    """

    calls: ToolCallFormat | None = None
    describes_tools: bool = False
    reasoning: ReasoningTags | None = None

    def marks(self) -> tuple[str, ...]:
        """Return the texts that must be seen, also where a model has a control token for one."""
        marks: list[str] = []
        if self.calls is not None:
            syntax = SYNTAX[self.calls]
            marks += [syntax.begin, syntax.end, ARGUMENTS_MARK]
        if self.reasoning is not None:
            marks += [self.reasoning.begin, self.reasoning.end]
        return tuple(mark for mark in marks if mark)


def syntax_of(
    template: str | None, calls: ToolCallFormat | None = None, *, tells_reasoning: bool = True
) -> AnswerSyntax:
    """Read from a chat template how its model writes; ``calls`` is known from elsewhere, if given."""
    source = template or ""
    describes = "tools" in source
    tags = next((tags for tags in REASONING_TAGS if tags.end in source), None)
    if calls is ToolCallFormat.MISTRAL and ARGUMENTS_MARK in source:
        calls = ToolCallFormat.MISTRAL_ARGS
    return AnswerSyntax(calls or _calls_of(source, describes), describes, tags if tells_reasoning else None)


def _calls_of(source: str, describes: bool) -> ToolCallFormat | None:
    if not describes:
        return ToolCallFormat.HERMES
    if "[TOOL_CALLS]" in source:
        return ToolCallFormat.MISTRAL_ARGS if ARGUMENTS_MARK in source else ToolCallFormat.MISTRAL
    if "<tool_call>" in source:
        return None if "<function=" in source else ToolCallFormat.HERMES  # Qwen3-Coder writes XML inside
    if "<|python_tag|>" in source or ("<|start_header_id|>" in source and '"parameters"' in source):
        return ToolCallFormat.LLAMA3_JSON
    return None
