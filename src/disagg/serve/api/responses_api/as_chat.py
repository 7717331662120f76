"""A ``/v1/responses`` request as the chat that it is."""

from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec

from disagg.base.errors import InvalidRequestError
from disagg.serve.api.responses_api.schema import FlatToolChoice, InputItem, ResponsesRequest
from disagg.serve.api.schema import (
    ChatCompletionRequest,
    ChatMessage,
    ContentPart,
    FunctionDefinition,
    GenerationFields,
    JsonSchemaFormat,
    MessageFunction,
    MessageToolCall,
    NamedFunction,
    NamedToolChoice,
    ResponseFormat,
    ToolDefinition,
)

_TEXT_PARTS: Final = frozenset({"input_text", "output_text", "text", "reasoning_text"})


_NAMES: Final = (
    ("response_format.json_schema.schema", "text.format.schema"),
    ("response_format", "text.format"),
    ("].function.parameters", "].parameters"),
    ("max_tokens", "max_output_tokens"),
    ("messages", "input"),
)
"""Places in a chat, and what they are in a request for a response."""


def in_own_words(error: InvalidRequestError) -> InvalidRequestError:
    """Return what is wrong with the chat in the words of the request that it was made of."""
    words, param = str(error), error.param
    for of_chat, own in _NAMES:
        words = words.replace(f"'{of_chat}", f"'{own}") if of_chat[0] != "]" else words.replace(of_chat, own)
        param = own.split(".")[0] if param == of_chat else param
    return type(error)(words, param)


def as_chat(request: ResponsesRequest) -> ChatCompletionRequest:
    """Return the chat whose answer is the response. Raises InvalidRequestError for what is not served."""
    if (request.n or 1) > 1:
        raise InvalidRequestError("'n': a response is one answer, leave it out", "n")
    if request.top_logprobs:
        raise InvalidRequestError("'top_logprobs' is not supported here: ask /v1/chat/completions", "top_logprobs")
    common = {name: getattr(request, name) for name in GenerationFields.__struct_fields__}
    common["max_tokens"] = request.max_output_tokens or request.most_tokens
    common["response_format"] = _response_format(request)
    common["stream_options"] = None
    return ChatCompletionRequest(
        **common,
        messages=list(_messages(request)),
        tools=_tools(request),
        tool_choice=_tool_choice(request),
        parallel_tool_calls=request.parallel_tool_calls,
        chat_template_kwargs=request.chat_template_kwargs,
    )


def _response_format(request: ResponsesRequest) -> ResponseFormat | None:
    wanted = request.text.format if request.text is not None else None
    if wanted is None:
        return request.response_format
    described = JsonSchemaFormat(wanted.name, wanted.schema, wanted.description, wanted.strict)
    return ResponseFormat(wanted.type, described if wanted.type == "json_schema" else None)


def _tools(request: ResponsesRequest) -> list[ToolDefinition] | None:
    if request.tools is None:
        return None
    return [
        ToolDefinition("function", FunctionDefinition(tool.name, tool.description, tool.parameters, tool.strict))
        for tool in request.tools
    ]


def _tool_choice(request: ResponsesRequest) -> Any:
    if isinstance(request.tool_choice, FlatToolChoice):
        return NamedToolChoice("function", NamedFunction(request.tool_choice.name))
    return request.tool_choice


def _messages(request: ResponsesRequest) -> Iterator[ChatMessage]:
    """Yield the conversation's messages: calls and reasoning are parts of the assistant's turn that they belong to."""
    if request.instructions:
        yield ChatMessage("system", request.instructions)
    if isinstance(request.input, str):
        yield ChatMessage("user", request.input)
        return
    turn: ChatMessage | None = None
    for index, item in enumerate(request.input):
        message = _message(item, index)
        if turn is not None and message.role == "assistant" and _goes_on(turn, message):
            turn = _joined(turn, message)
            continue
        if turn is not None:
            yield turn
        turn = message
    if turn is not None:
        yield turn


def _message(item: InputItem, index: int) -> ChatMessage:
    place = f"input[{index}]"
    match item.type:
        case "message" if item.role is not None:
            return ChatMessage(item.role, _text(item.content, f"{place}.content"))
        case "function_call" if item.name is not None and item.call_id is not None:
            call = MessageToolCall(MessageFunction(item.name, item.arguments or ""), item.call_id)
            return ChatMessage("assistant", tool_calls=[call])
        case "function_call_output" if item.call_id is not None:
            return ChatMessage("tool", _text(item.output, f"{place}.output"), tool_call_id=item.call_id)
        case "reasoning":
            return ChatMessage("assistant", reasoning_content=_text(item.content, f"{place}.content"))
        case "message" | "function_call" | "function_call_output":
            wanted = {"message": "role", "function_call": "name' and 'call_id"}.get(item.type, "call_id")
            raise InvalidRequestError(f"'{place}' of type '{item.type}' needs '{wanted}'", "input")
    raise InvalidRequestError(
        f"'{place}' of type '{item.type[:80]}' is not supported: give message, function_call, function_call_output or "
        "reasoning",
        "input",
    )


def _text(content: str | Sequence[ContentPart] | None, place: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts: list[str] = []
    for position, part in enumerate(content):
        if part.type not in _TEXT_PARTS or part.text is None:
            raise InvalidRequestError(
                f"'{place}[{position}]' of type '{part.type[:80]}' is not supported, only text", "input"
            )
        texts.append(part.text)
    return "\n".join(texts)


def _goes_on(turn: ChatMessage, message: ChatMessage) -> bool:
    """Whether a message belongs to the assistant's turn before it: that has no text yet, or this has none."""
    return turn.role == "assistant" and not (turn.content and message.content)


def _joined(turn: ChatMessage, message: ChatMessage) -> ChatMessage:
    calls = [*(turn.tool_calls or ()), *(message.tool_calls or ())]
    return msgspec.structs.replace(
        turn,
        content=turn.content or message.content,
        reasoning_content=turn.reasoning_content or message.reasoning_content,
        tool_calls=calls or None,
    )
