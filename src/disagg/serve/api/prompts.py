"""What a client asks about, as token ids: texts, token ids, chats."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from disagg.base.block_hash import first_link, hash_blocks
from disagg.base.errors import ConfigurationError, ContextLengthError, InvalidRequestError
from disagg.base.ids import BlockHash
from disagg.models.chat_template import ChatTemplate
from disagg.models.tool_calls.syntax import SYNTAX, AnswerSyntax, ToolCallFormat, syntax_of
from disagg.serve.api.answer_grammar import chat_grammar, offered_tools
from disagg.serve.api.reading import AnswerReading
from disagg.serve.api.schema import (
    MAX_PROMPTS,
    MAX_SEQUENCES,
    MAX_TOKENS_OF_ALL_PROMPTS,
    ChatCompletionRequest,
    ChatMessage,
    CompletionRequest,
    GenerationFields,
    MessageToolCall,
    NamedToolChoice,
    TokenizeRequest,
    ToolDefinition,
)
from disagg.serve.api.served_model import ServedModel

LENGTH_LIMIT: Final = "this model's maximum context length is {} tokens, prompt and answer together"
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


class Prompt(msgspec.Struct, frozen=True, array_like=True):
    """One prompt. ``text`` is what an echo shows, where one is asked for. ``block_hashes`` name its KV blocks."""

    token_ids: tuple[int, ...]
    text: str | None = None
    block_hashes: tuple[BlockHash, ...] = ()


def completion_prompts(request: CompletionRequest, model: ServedModel, max_model_len: int) -> list[Prompt]:
    """Return each prompt of a completion request."""
    given = request.prompt
    items: Sequence[str | int | list[int]] = [given] if isinstance(given, str) else given
    if not items:
        raise InvalidRequestError("'prompt' is an empty list: give at least one prompt", "prompt")
    if isinstance(items[0], int):
        token_ids = [item for item in items if isinstance(item, int)]
        if len(token_ids) != len(items):
            raise _mixed()
        return [_completion_prompt(token_ids, request, model, max_model_len)]
    if len(items) > MAX_PROMPTS:
        raise InvalidRequestError(f"'prompt' has {len(items)} prompts, more than {MAX_PROMPTS}: send fewer", "prompt")
    if (num_sequences := len(items) * (request.n or 1)) > MAX_SEQUENCES:
        raise InvalidRequestError(
            f"{len(items)} prompts of {request.n} choices are {num_sequences} sequences, more than {MAX_SEQUENCES}: "
            "send fewer prompts, or ask for fewer choices",
            "n",
        )
    return _several_prompts(items, request, model, max_model_len)


def _several_prompts(
    items: Sequence[str | int | list[int]], request: CompletionRequest, model: ServedModel, max_model_len: int
) -> list[Prompt]:
    prompts, num_tokens = [], 0
    for item in items:
        if isinstance(item, int):
            raise _mixed()
        prompts.append(_completion_prompt(item, request, model, max_model_len))
        num_tokens += len(prompts[-1].token_ids)
        if num_tokens > max(MAX_TOKENS_OF_ALL_PROMPTS, max_model_len):
            raise InvalidRequestError(
                f"the prompts have more than {MAX_TOKENS_OF_ALL_PROMPTS} tokens in all: send fewer at once", "prompt"
            )
    return prompts


def _completion_prompt(
    given: str | list[int], request: CompletionRequest, model: ServedModel, max_model_len: int
) -> Prompt:
    if isinstance(given, str):
        check_bytes(given, "prompt", model, max_model_len)
        whole = model.tokenizer.encode(given, add_special_tokens=request.add_special_tokens is not False)
        token_ids = _truncated(whole, request, max_model_len)
        if len(token_ids) == len(whole):
            return _prompt(token_ids, given if request.echo else None, request, model, max_model_len)
    else:
        token_ids = _truncated(given, request, max_model_len)
    prompt = _prompt(token_ids, None, request, model, max_model_len)
    if not request.echo:
        return prompt
    text = model.tokenizer.decode(token_ids, skip_special_tokens=request.skip_special_tokens is not False)
    return msgspec.structs.replace(prompt, text=text)


class ChatPrompt(msgspec.Struct, frozen=True):
    """A chat as a prompt, with what reads its answer and the grammar of it, "" where there is none."""

    prompt: Prompt
    reading: AnswerReading
    grammar: str = ""


def chat_prompt(request: ChatCompletionRequest, model: ServedModel, max_model_len: int) -> ChatPrompt:
    """Return a chat as the model's template writes it."""
    template = _template(request, model)
    syntax = template_syntax(template, model)
    tools = offered_tools(request)
    text = _render(request.messages, tools_for_template(tools), template, syntax, request)
    check_bytes(text, "messages", model, max_model_len)
    is_thinking = syntax.reasoning is not None and text.rstrip().endswith(syntax.reasoning.begin)
    grammar = chat_grammar(request, tools, syntax, model.tokenizer, is_thinking=is_thinking)
    token_ids = model.tokenizer.encode(text, add_special_tokens=bool(request.add_special_tokens))
    names_call = isinstance(request.tool_choice, NamedToolChoice)
    return ChatPrompt(
        _prompt(_truncated(token_ids, request, max_model_len), None, request, model, max_model_len),
        AnswerReading(syntax, bool(tools), is_thinking, names_call),
        grammar,
    )


def tokenize_prompt(request: TokenizeRequest, model: ServedModel, max_model_len: int | None) -> list[int]:
    """Return the token ids that a prompt or a chat would have."""
    if request.messages is not None and request.prompt is None:
        template = _template(request, model)
        tools = tools_for_template(request.tools or [])
        text = _render(request.messages, tools, template, template_syntax(template, model), request)
        check_bytes(text, "messages", model, max_model_len)
        return _checked(model.tokenizer.encode(text, add_special_tokens=bool(request.add_special_tokens)), model)
    if request.prompt is None or request.messages is not None:
        raise InvalidRequestError("give either 'prompt' or 'messages'", "prompt")
    check_bytes(request.prompt, "prompt", model, max_model_len)
    return model.tokenizer.encode(request.prompt, add_special_tokens=request.add_special_tokens is not False)


def check_bytes(text: str, param: str, model: ServedModel, max_model_len: int | None) -> None:
    """Raise ContextLengthError for a text that cannot fit, whatever its tokens: before the work of finding them."""
    if max_model_len is None or 4 * len(text) <= max_model_len:
        return
    num_bytes, longest = len(text.encode("utf-8", "surrogatepass")), model.tokenizer.max_token_bytes
    if num_bytes > max_model_len * longest:
        raise ContextLengthError(
            f"'{param}' has {num_bytes} bytes, but this model's maximum context length is {max_model_len} tokens of at "
            f"most {longest} bytes, {max_model_len * longest} bytes in all: shorten it",
            param,
        )


def check_fits(num_prompt_tokens: int, limit: int) -> None:
    """Raise ContextLengthError for a prompt that leaves no room for an answer in ``limit`` tokens."""
    # One token is always sampled, even where only the prompt's probabilities are wanted.
    if num_prompt_tokens >= limit:
        raise ContextLengthError(
            f"{LENGTH_LIMIT.format(limit)}, but the prompt has {num_prompt_tokens} tokens: shorten it", "prompt"
        )


def _render(
    messages: Sequence[ChatMessage],
    tools: Sequence[dict[str, Any]],
    template: ChatTemplate,
    syntax: AnswerSyntax,
    fields: ChatCompletionRequest | TokenizeRequest,
) -> str:
    if fields.continue_final_message and fields.add_generation_prompt:
        raise InvalidRequestError(
            "'continue_final_message' and 'add_generation_prompt' exclude each other: give one of them",
            "continue_final_message",
        )
    plain = plain_messages(messages, tools, syntax)
    given = tools if tools and syntax.describes_tools else None
    variables = fields.chat_template_kwargs
    if fields.continue_final_message:
        return template.render_continued(plain, tools=given, variables=variables)
    begins_answer = fields.add_generation_prompt is not False
    return template.render(plain, add_generation_prompt=begins_answer, tools=given, variables=variables)


def _template(fields: ChatCompletionRequest | TokenizeRequest, model: ServedModel) -> ChatTemplate:
    return model.chat_template if fields.chat_template is None else _own_template(fields.chat_template, model)


def template_syntax(template: ChatTemplate, model: ServedModel) -> AnswerSyntax:
    """Return how answers to a template are written: of the model's own, what the server was told or has found."""
    return model.syntax if template is model.chat_template else syntax_of(template.source)


def _own_template(source: str, model: ServedModel) -> ChatTemplate:
    if not model.trusts_request_templates:
        raise InvalidRequestError(
            "'chat_template': templates are programs, and this server runs the model's alone; "
            "to change that, start it with --trust-request-chat-template",
            "chat_template",
        )
    try:
        return ChatTemplate(source, model.tokenizer.special_tokens)
    except ConfigurationError as error:
        raise InvalidRequestError(f"'chat_template': {error}", "chat_template") from error


def _truncated(
    token_ids: list[int], request: CompletionRequest | ChatCompletionRequest, max_model_len: int
) -> list[int]:
    """Return the last ``truncate_prompt_tokens`` of a prompt; -1 keeps what leaves room for the answer, as in vLLM."""
    wanted = request.truncate_prompt_tokens
    if wanted is None:
        return token_ids
    if wanted == 0 or wanted >= max_model_len:
        raise InvalidRequestError(
            f"'truncate_prompt_tokens' is {wanted}: give -1, or from 1 to {max_model_len - 1} tokens",
            "truncate_prompt_tokens",
        )
    room = max_model_len - max(request.most_tokens or 1, 1)
    return token_ids[-max(wanted if wanted > 0 else room, 1) :]


def _prompt(
    token_ids: list[int], text: str | None, request: GenerationFields, model: ServedModel, max_model_len: int
) -> Prompt:
    check_fits(len(token_ids), max_model_len)
    names = hash_blocks(token_ids, model.hash_block_size, first_link(request.cache_salt or ""))
    return Prompt(tuple(_checked(token_ids, model)), text, names)


def _mixed() -> InvalidRequestError:
    return InvalidRequestError("'prompt' mixes token ids with texts or lists: send one kind", "prompt")


def _checked(token_ids: list[int], model: ServedModel) -> list[int]:
    if not token_ids:
        raise InvalidRequestError("the prompt has no tokens: give at least one", "prompt")
    largest = max(token_ids)
    if largest >= model.vocab_size:
        raise InvalidRequestError(
            f"'prompt': token id {largest} is outside the vocabulary of {model.vocab_size}", "prompt"
        )
    return token_ids


# A chat's messages as templates know them -------------------------------------------------------------------------


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
