"""What a chat's tools ask of its answer: that it may, must or must not call them, as a grammar."""

from collections.abc import Sequence

from disagg.base.errors import InvalidRequestError
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
from disagg.serve.api.answer_grammar import answer_part, json_part, written
from disagg.serve.api.schema import ChatCompletionRequest, NamedToolChoice, ToolDefinition


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
