"""What a request wants its answer to look like, as one grammar: ``response_format``, vLLM's fields, calls of tools."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import llguidance
import msgspec

from disagg.base.errors import InvalidRequestError
from disagg.models.grammar import grammar_fault
from disagg.models.tokenizer import Tokenizer
from disagg.models.tool_calls.grammar import (
    CallableTool,
    Part,
    after_thinking,
    either,
    forced_calls,
    free_calls,
)
from disagg.models.tool_calls.syntax import AnswerSyntax
from disagg.serve.api.schema import (
    ChatCompletionRequest,
    GenerationFields,
    NamedToolChoice,
    ResponseFormat,
    StructuredOutputs,
    ToolDefinition,
)

_WHITESPACE: Final = r" |\n[ \t]{0,40}"
"""Between the parts of a JSON document: what writers use, and no more, as a small model may never end it."""
_MAPS_OF_SCHEMAS: Final = ("properties", "patternProperties", "$defs", "definitions")
_LISTS_OF_SCHEMAS: Final = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMAS: Final = ("items", "additionalProperties")
_MAX_CHECKS: Final = 500
"""Parts of a schema that are looked at to find the place of a fault."""


def answer_part(request: GenerationFields) -> Part | None:
    """Return what an answer has to be, None where it may be anything.

    Raises InvalidRequestError, with the place, for what is no schema or grammar, is too large, or is asked for twice.
    """
    asked = list(_asked(request))
    if not asked:
        return None
    if len(asked) > 1:
        names = " and ".join(f"'{place}'" for place, _ in asked)
        raise InvalidRequestError(f"{names} exclude each other: give one of them", asked[1][0].split(".")[0])
    place, make = asked[0]
    if request.ignore_eos:
        raise InvalidRequestError(f"'ignore_eos' and '{place}' exclude each other: leave one out", "ignore_eos")
    return make(place)


def written(*parts: Part) -> str:
    """Return the grammar of ``parts`` as instances are told it. The first may refer to others as ``@name``."""
    return msgspec.json.encode({"grammars": parts}).decode()


def json_part(schema: dict[str, Any] | bool, place: str) -> Part:
    """Return what documents of a JSON schema are. Raises as ``answer_part`` does."""
    part = _json_part(schema)
    if not (fault := grammar_fault(written(part))):
        return part
    where, fault = _innermost(schema, place, fault) if isinstance(schema, dict) else (place, fault)
    raise InvalidRequestError(f"'{where}' is no JSON schema that can be kept to: {fault}", place.split(".")[0])


def _json_part(schema: dict[str, Any] | bool) -> Part:
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    return {"json_schema": {**schema, "x-guidance": {"whitespace_pattern": _WHITESPACE}}}


def _innermost(schema: dict[str, Any], place: str, fault: str) -> tuple[str, str]:
    """Return the innermost part of a faulty schema that is faulty by itself: its place, and what is said of it."""
    shared: dict[str, Any] = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    num_checks = 0
    while True:
        for step, inner in _inner(schema):
            num_checks += 1
            if num_checks > _MAX_CHECKS:
                return place, fault
            if found := grammar_fault(written(_json_part({**shared, **inner}))):
                schema, place, fault = inner, f"{place}{step}", found
                break
        else:
            return place, fault


def _inner(schema: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the schemas right inside of one, with the way to them."""
    for name in _MAPS_OF_SCHEMAS:
        if isinstance(inner := schema.get(name), dict):
            yield from ((f".{name}.{key}", one) for key, one in inner.items() if isinstance(one, dict))
    for name in _LISTS_OF_SCHEMAS:
        if isinstance(inner := schema.get(name), list):
            yield from ((f".{name}[{index}]", one) for index, one in enumerate(inner) if isinstance(one, dict))
    for name in _SCHEMAS:
        if isinstance(inner := schema.get(name), dict):
            yield f".{name}", inner


def _asked(request: GenerationFields) -> Iterator[tuple[str, Callable[[str], Part]]]:
    """Yield each field that says what the answer has to be, and what makes a grammar of it."""
    if (wanted := request.response_format) is not None and wanted.type != "text":
        yield _response_format(wanted)
    if request.structured_outputs is not None:
        yield from _structured(request.structured_outputs, "structured_outputs.")
    older = StructuredOutputs(
        json=request.guided_json,
        regex=request.guided_regex,
        choice=request.guided_choice,
        grammar=request.guided_grammar,
    )
    yield from _structured(older, "guided_")


def _response_format(wanted: ResponseFormat) -> tuple[str, Callable[[str], Part]]:
    if wanted.type == "json_object":
        return "response_format", lambda place: json_part({"type": "object"}, place)
    described = wanted.json_schema
    if described is None:
        raise InvalidRequestError("missing parameter 'response_format.json_schema'", "response_format")
    schema = {} if described.schema is None else described.schema
    return "response_format.json_schema.schema", lambda place: json_part(schema, place)


def _structured(wanted: StructuredOutputs, prefix: str) -> Iterator[tuple[str, Callable[[str], Part]]]:
    if (schema := wanted.json) is not None:
        yield f"{prefix}json", lambda place: json_part(_parsed(schema, place), place)
    if wanted.json_object:
        yield f"{prefix}json_object", lambda place: json_part({"type": "object"}, place)
    if (regex := wanted.regex) is not None:
        yield f"{prefix}regex", lambda place: _lark_part(_regex(regex), place)
    if (choice := wanted.choice) is not None:
        texts = " | ".join(msgspec.json.encode(text).decode() for text in choice)
        yield f"{prefix}choice", lambda place: _lark_part(f"start: {texts}", place)
    if (grammar := wanted.grammar) is not None:
        yield f"{prefix}grammar", lambda place: _lark_part(_lark(grammar, place), place)


def _parsed(schema: dict[str, Any] | bool | str, place: str) -> dict[str, Any] | bool:
    if not isinstance(schema, str):
        return schema
    try:
        return msgspec.json.decode(schema, type=dict[str, Any] | bool)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise InvalidRequestError(f"'{place}' is a text that is no JSON schema: {error}", place.split(".")[0]) from None


def _lark(grammar: str, place: str) -> str:
    """Return a grammar, which may be one of llama.cpp's, as Lark."""
    try:
        return llguidance.grammar_from("grammar", grammar)
    except ValueError as error:
        raise InvalidRequestError(f"'{place}': {error}", place.split(".")[0]) from None


def _regex(pattern: str) -> str:
    grammar = msgspec.json.decode(llguidance.LLMatcher.grammar_from_regex(pattern))
    return str(grammar["grammars"][0]["lark_grammar"])


def _lark_part(lark: str, place: str) -> Part:
    part: Part = {"lark_grammar": lark}
    if fault := grammar_fault(written(part)):
        raise InvalidRequestError(f"'{place}' is no grammar that can be kept to: {fault}", place.split(".")[0])
    return part


# Of a chat's tools ------------------------------------------------------------------------------------------------


def offered_tools(request: ChatCompletionRequest) -> list[ToolDefinition]:
    """Return the tools that the model may call. Raises InvalidRequestError where the choice makes no sense."""
    tools, choice = request.tools or [], request.tool_choice
    if choice == "none":
        return []
    if not tools:
        if choice == "required" or isinstance(choice, NamedToolChoice):
            raise InvalidRequestError("'tool_choice' asks for a call, but 'tools' has none: add them", "tool_choice")
        return []
    names = [tool.function.name for tool in tools]
    if doubled := next((name for name in names if names.count(name) > 1), None):
        raise InvalidRequestError(f"'tools' has {doubled!r} twice: give each tool a name of its own", "tools")
    if isinstance(choice, NamedToolChoice) and choice.function.name not in names:
        raise InvalidRequestError(
            f"'tool_choice' names {choice.function.name!r}, which is not in 'tools': {', '.join(names)[:200]}",
            "tool_choice",
        )
    return tools


def chat_grammar(
    request: ChatCompletionRequest,
    tools: Sequence[ToolDefinition],
    syntax: AnswerSyntax,
    tokenizer: Tokenizer,
    *,
    is_thinking: bool,
) -> str:
    """Return the grammar of a chat's answer, "" where it may be anything. Raises InvalidRequestError."""

    def control_token(text: str) -> int | None:
        token_id = tokenizer.token_id(text)
        return token_id if token_id is not None and tokenizer.is_special(token_id) else None

    if tools and syntax.calls is None:
        raise InvalidRequestError(
            "this model's chat template writes calls of tools in a form that is not known here: leave 'tools' out, or "
            "start the server with --tool-call-parser",
            "tools",
        )
    part, choice = answer_part(request), request.tool_choice
    is_forced = choice == "required" or isinstance(choice, NamedToolChoice)
    if part is not None and is_forced:
        raise InvalidRequestError(
            "'tool_choice' asks for a call, and another field for an answer of a form: leave one of them out",
            "tool_choice",
        )
    parts = [] if part is None else [part]
    is_strict = any(tool.function.strict for tool in tools)
    if tools and (is_forced or is_strict or part is not None):
        callable_tools = _callable(tools, choice.function.name if isinstance(choice, NamedToolChoice) else None)
        parallel = request.parallel_tool_calls is not False and not isinstance(choice, NamedToolChoice)
        write = forced_calls if is_forced or part is not None else free_calls
        calls = write(syntax, callable_tools, control_token, parallel=parallel) or []
        parts = calls if part is None else either(part, calls)
    if parts and syntax.reasoning is not None:
        parts = after_thinking(syntax.reasoning, parts, control_token, is_thinking=is_thinking)
    return written(*parts) if parts else ""


def _callable(tools: Sequence[ToolDefinition], name: str | None) -> list[CallableTool]:
    """Return the tools that may be called, or the one called ``name``, with their arguments' grammars."""
    found: list[CallableTool] = []
    for index, tool in enumerate(tools):
        function = tool.function
        if name is None or function.name == name:
            nothing: Part = {"type": "object", "properties": {}, "additionalProperties": False}
            schema = nothing if function.parameters is None else function.parameters
            found.append(CallableTool(function.name, json_part(schema, f"tools[{index}].function.parameters")))
    return found
