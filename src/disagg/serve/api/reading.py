"""How the answers to one chat are read: what is reasoning, and what a call of a tool."""

import msgspec

from disagg.models.tokenizer import Tokenizer
from disagg.models.tool_calls.parsing import AnswerParser
from disagg.models.tool_calls.syntax import AnswerSyntax


class AnswerReading(msgspec.Struct, frozen=True, array_like=True):
    """See the module. ``is_thinking``: the prompt has opened the reasoning. ``names_call``: the tool is prescribed."""

    syntax: AnswerSyntax
    has_tools: bool = False
    is_thinking: bool = False
    names_call: bool = False

    def parser(self) -> AnswerParser | None:
        """Return what reads one answer, None where all of it is content."""
        calls = self.syntax.calls if self.has_tools else None
        if calls is None and self.syntax.reasoning is None:
            return None
        return AnswerParser(calls, self.syntax.reasoning, is_thinking=self.is_thinking)

    def marks(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Return the control tokens that are shown to the parser, though no client sees them."""
        calls = self.syntax.calls if self.has_tools else None
        ids = (tokenizer.token_id(mark) for mark in AnswerSyntax(calls, reasoning=self.syntax.reasoning).marks())
        return frozenset(token_id for token_id in ids if token_id is not None and tokenizer.is_special(token_id))
