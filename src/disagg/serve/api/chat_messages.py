"""A chat's messages as templates know them, with the turns of tools."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from disagg.base.errors import InvalidRequestError
from disagg.models.tool_calls.syntax import SYNTAX, AnswerSyntax, ToolCallFormat
from disagg.serve.api.schema import ChatMessage, MessageToolCall, ToolDefinition

_DESCRIPTION: Final = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""
"""Qwen 2.5's words, for models whose templates have none."""


def plain_messages(
    messages: Sequence[ChatMessage], tools: Sequence[Mapping[str, object]], syntax: AnswerSyntax
) -> list[dict[str, Any]]:
    """Return the messages as the template takes them. Raises InvalidRequestError, with the place."""
    plain = [_plain(message, index) for index, message in enumerate(messages)]
    if syntax.describes_tools:
        return plain
    plain = [_without_tool_turns(message) for message in plain]
    return _described(plain, tools) if tools else plain


def tools_for_template(tools: Sequence[ToolDefinition]) -> list[dict[str, Any]]:
    """Return tools as templates know them."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool.function.name,
                "description": tool.function.description or "",
                "parameters": tool.function.parameters or {"type": "object", "properties": {}},
            },
        }
        for tool in tools
    ]


def _plain(message: ChatMessage, index: int) -> dict[str, Any]:
    """Return one message. OpenAI's ``developer`` is what models have learned as ``system``."""
    role = "system" if message.role == "developer" else message.role
    plain: dict[str, Any] = {"role": role, "content": _text(message, index)}
    if message.name is not None:
        plain["name"] = message.name
    reasoning = message.reasoning if message.reasoning_content is None else message.reasoning_content
    if reasoning is not None and (reasoning or message.reasoning_content is not None):
        plain["reasoning_content"] = reasoning
    if message.tool_calls:
        plain["tool_calls"] = [
            _plain_call(call, f"messages[{index}].tool_calls[{position}]")
            for position, call in enumerate(message.tool_calls)
        ]
    if message.tool_call_id:
        plain["tool_call_id"] = message.tool_call_id
    elif role == "tool":
        raise InvalidRequestError(f"missing parameter 'messages[{index}].tool_call_id'", "messages")
    return plain


def _plain_call(call: MessageToolCall, place: str) -> dict[str, Any]:
    """Return a call with its arguments as an object, which templates write in their own way."""
    arguments: object = call.function.arguments
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments) if arguments.strip() else {}
        except (msgspec.MsgspecError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        raise InvalidRequestError(f"'{place}.function.arguments' is no JSON object", "messages")
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def _text(message: ChatMessage, index: int) -> str:
    if message.content is None or isinstance(message.content, str):
        return message.content or ""
    texts = []
    for position, part in enumerate(message.content):
        if part.type != "text" or part.text is None:
            where = f"messages[{index}].content[{position}]"
            raise InvalidRequestError(f"'{where}' of type '{part.type}' is not supported, only 'text'", "messages")
        texts.append(part.text)
    return "\n".join(texts)


def _without_tool_turns(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message for a template that knows no tools: calls and results are text."""
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    calls = message.get("tool_calls")
    if not calls:
        return message
    syntax = SYNTAX[ToolCallFormat.HERMES]
    written = [f"{syntax.begin}\n{msgspec.json.encode(call['function']).decode()}\n{syntax.end}" for call in calls]
    rest = {name: value for name, value in message.items() if name != "tool_calls"}
    return {**rest, "content": "\n".join([message["content"], *written] if message["content"] else written)}


def _described(messages: list[dict[str, Any]], tools: Sequence[Mapping[str, object]]) -> list[dict[str, Any]]:
    """Return messages whose system message tells of the tools."""
    words = _DESCRIPTION.format("\n".join(msgspec.json.encode(tool).decode() for tool in tools))
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": words}, *messages]
    return [{**messages[0], "content": f"{messages[0]['content']}\n\n{words}"}, *messages[1:]]
