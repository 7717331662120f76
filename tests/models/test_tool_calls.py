"""How models write tool calls and reasoning: read as text comes, however it is cut, and asked for by grammars."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg.models.grammar import grammar_fault
from disagg.models.tool_calls.grammar import CallableTool, after_thinking, either, forced_calls, free_calls
from disagg.models.tool_calls.parsing import AnswerParser, Piece, PieceKind, joined
from disagg.models.tool_calls.syntax import REASONING_TAGS, AnswerSyntax, ToolCallFormat, syntax_of

TWO_CALLS = {
    ToolCallFormat.HERMES: '<tool_call>\n{"name": "a", "arguments": {"x": "}\\"]"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "b", "arguments": {}}\n</tool_call>',
    ToolCallFormat.LLAMA3_JSON: '{"name": "a", "parameters": {"x": "}\\"]"}}; {"name": "b", "parameters": {}}',
    ToolCallFormat.MISTRAL: '[TOOL_CALLS][{"name": "a", "arguments": {"x": "}\\"]"}}, {"name": "b", "arguments": {}}]',
    ToolCallFormat.MISTRAL_ARGS: '[TOOL_CALLS]a[ARGS]{"x": "}\\"]"}[TOOL_CALLS]b[ARGS]{}',
}
OBJECT: dict[str, Any] = {"json_schema": {"type": "object"}}


def read(text: str, cuts: list[int], calls: ToolCallFormat | None, **settings: Any) -> list[Piece]:
    parser = AnswerParser(calls, settings.pop("reasoning", None), **settings)
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    pieces = [piece for a, b in pairwise(places) for piece in parser.push(text[a:b])]
    return pieces + parser.push("", is_last=True)


def seen(pieces: list[Piece]) -> dict[str, Any]:
    """What a client has in the end."""
    names = [piece.text for piece in pieces if piece.kind is PieceKind.CALL]
    of_call = [[one for one in pieces if one.index == index] for index in range(len(names))]
    return {
        "content": joined(pieces, PieceKind.CONTENT),
        "reasoning": joined(pieces, PieceKind.REASONING),
        "calls": [(name, joined(own, PieceKind.ARGUMENTS)) for name, own in zip(names, of_call, strict=True)],
    }


cuts = st.lists(st.integers(0, 400), max_size=40)


@given(cuts=cuts, calls=st.sampled_from(ToolCallFormat), thinks=st.sampled_from(["", "in prompt", "in answer"]))
def test_calls_are_read_however_they_are_cut(cuts: list[int], calls: ToolCallFormat, thinks: str) -> None:
    text = {"": "", "in prompt": "Hm, </thin? </think>\n\n", "in answer": "<think>\nHm, </thin?\n</think>\n"}[thinks]
    pieces = read(text + TWO_CALLS[calls], cuts, calls, reasoning=REASONING_TAGS[0], is_thinking=thinks == "in prompt")
    assert seen(pieces) == {
        "content": "",
        "reasoning": "Hm, </thin?" if thinks else "",
        "calls": [("a", '{"x": "}\\"]"}'), ("b", "{}")],
    }


@pytest.mark.parametrize(
    ("calls", "text", "content", "called"),
    [
        ("hermes", 'Wait.\n<tool_call>{"arguments": {"x": 1}, "name": "a"}</tool_call>', "Wait.", [("a", '{"x": 1}')]),
        ("hermes", "plain < text <tool", "plain < text <tool", []),
        ("hermes", "a <tool_call> b", "a <tool_call> b", []),
        ("hermes", '<tool_call>\n{"name": "a", "arguments": {"x', "", [("a", '{"x')]),
        ("hermes", '<tool_call>\n{"na', '<tool_call>\n{"na', []),
        ("hermes", '<tool_call>{"name": "a", "arguments": "{\\"x\\": 1}"}</tool_call>', "", [("a", '{"x": 1}')]),
        ("llama3_json", '<|python_tag|>{"name": "a", "parameters": {}}', "", [("a", "{}")]),
        ("llama3_json", '{"x": 1} is JSON', '{"x": 1} is JSON', []),
        ("llama3_json", 'So {"name": "a", "parameters": {}}', 'So {"name": "a", "parameters": {}}', []),
        ("mistral", "Hey [TOOL_CALLS] no", "Hey [TOOL_CALLS] no", []),
    ],
)  # fmt: skip
@given(cuts=cuts)
def test_what_is_no_call_is_content(
    calls: str, text: str, content: str, called: list[tuple[str, str]], cuts: list[int]
) -> None:
    found = seen(read(text, cuts, ToolCallFormat(calls)))
    assert (found["content"], found["calls"]) == (content, called)


@given(text=st.text(alphabet='<tool_call>{}"name:a,argumets[] \n/', max_size=80), cuts=cuts)
def test_any_text_is_read_alike_however_it_is_cut(text: str, cuts: list[int]) -> None:
    for calls in ToolCallFormat:
        assert seen(read(text, cuts, calls)) == seen(read(text, [], calls))


@given(cuts=cuts)
def test_reasoning_that_never_ends_is_reasoning(cuts: list[int]) -> None:
    tags = REASONING_TAGS[0]
    assert seen(read("<think> so long", cuts, None, reasoning=tags))["reasoning"] == "so long"
    assert seen(read("no thought <think>", cuts, None, reasoning=tags))["content"] == "no thought <think>"


@pytest.mark.parametrize("calls", ToolCallFormat)
def test_what_the_grammar_asks_for_is_what_the_parser_reads(calls: ToolCallFormat) -> None:
    """Both directions of one form: the examples above are texts of the grammar."""
    tools = [CallableTool("a", OBJECT), CallableTool("b", OBJECT)]
    parts = forced_calls(AnswerSyntax(calls), tools, lambda _: None, parallel=True)
    for one in (parts, after_thinking(REASONING_TAGS[0], parts, lambda _: None, is_thinking=False)):
        assert takes(one, TWO_CALLS[calls])
        assert not takes(one, "Certainly!")
    single = forced_calls(AnswerSyntax(calls), tools, lambda _: None, parallel=False)
    assert not takes(single, TWO_CALLS[calls])
    assert takes(
        after_thinking(REASONING_TAGS[0], parts, lambda _: None, is_thinking=True), f"So.</think>{TWO_CALLS[calls]}"
    )
    assert takes(either(OBJECT, parts), TWO_CALLS[calls])
    assert takes(either(OBJECT, parts), '{"x": 1}')


@pytest.mark.parametrize("calls", [calls for calls in ToolCallFormat if calls is not ToolCallFormat.LLAMA3_JSON])
def test_what_the_model_chooses_to_call_is_of_the_tools(calls: ToolCallFormat) -> None:
    """Text is free, also before and after calls; what begins as one must be one."""
    tools = [CallableTool("a", OBJECT), CallableTool("b", OBJECT)]
    parts = free_calls(AnswerSyntax(calls), tools, lambda _: None, parallel=True)
    assert parts is not None
    for text in ("", "No call.", TWO_CALLS[calls], f"Let me look.\n{TWO_CALLS[calls]}"):
        assert takes(parts, text)
    single = free_calls(AnswerSyntax(calls), tools[:1], lambda _: None, parallel=True)
    assert single is not None
    assert not takes(single, TWO_CALLS[calls]), "b is not offered"


def takes(parts: list[dict[str, Any]], text: str) -> bool:
    """Whether a whole text is one of the grammar's, by a vocabulary of bytes."""
    import llguidance

    class Bytes:
        eos_token_id, bos_token_id = 256, None
        tokens = [bytes((byte,)) for byte in range(256)] + [b"<eos>"]
        special_token_ids = (256,)

        def __call__(self, text: bytes) -> list[int]:
            return list(text)

    grammar = json.dumps({"grammars": parts})
    assert not grammar_fault(grammar)
    matcher = llguidance.LLMatcher(llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes())), grammar)
    tokens = list(text.encode())
    return bool(matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting())


QWEN = "{%- if tools %}{{- '<tools>' }}<tool_call>{% endif %}{{ '<think>' }}</think>"
LLAMA = '{% if tools %}<|start_header_id|>{"name": function name, "parameters": {}}{% endif %}'
MISTRAL = "{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]"


@pytest.mark.parametrize(
    ("template", "calls", "describes", "thinks"),
    [
        (QWEN, ToolCallFormat.HERMES, True, True),
        (LLAMA, ToolCallFormat.LLAMA3_JSON, True, False),
        (MISTRAL, ToolCallFormat.MISTRAL, True, False),
        (MISTRAL + "[ARGS]", ToolCallFormat.MISTRAL_ARGS, True, False),
        ("{% for tool in tools %}<tool_call><function=x>", None, True, False),
        ("{% for tool in tools %}whatever", None, True, False),
        ("{{ messages }}", ToolCallFormat.HERMES, False, False),
        (None, ToolCallFormat.HERMES, False, False),
    ],
)
def test_the_template_tells_the_form(
    template: str | None, calls: ToolCallFormat | None, describes: bool, thinks: bool
) -> None:
    syntax = syntax_of(template)
    assert (syntax.calls, syntax.describes_tools, syntax.reasoning is not None) == (calls, describes, thinks)
    assert syntax_of(template, ToolCallFormat.LLAMA3_JSON).calls is ToolCallFormat.LLAMA3_JSON
    assert syntax_of(template, tells_reasoning=False).reasoning is None
