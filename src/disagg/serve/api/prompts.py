"""What a client asks about, as token ids: texts, token ids, chats. Refuses what would change the answer unseen."""

from collections.abc import Sequence

from disagg.base.errors import InvalidRequestError
from disagg.serve.api.schema import ChatCompletionRequest, ChatMessage, CompletionRequest, TokenizeRequest
from disagg.serve.api.served_model import ServedModel

MAX_PROMPTS = 128


def completion_prompts(request: CompletionRequest, model: ServedModel) -> list[list[int]]:
    """Return the token ids of each prompt of a completion request."""
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise InvalidRequestError(f"'best_of' is not supported, got {request.best_of}; use 'n'", "best_of")
    if request.suffix:
        raise InvalidRequestError("'suffix' is not supported: the model completes to the right only", "suffix")
    given = request.prompt
    items: Sequence[str | int | list[int]] = [given] if isinstance(given, str) else given
    if not items:
        raise InvalidRequestError("'prompt' is an empty list", "prompt")
    if isinstance(items[0], int):
        if not all(isinstance(item, int) for item in items):
            raise InvalidRequestError("'prompt' mixes token ids with texts or lists", "prompt")
        return [_checked([item for item in items if isinstance(item, int)], model)]
    if len(items) > MAX_PROMPTS:
        raise InvalidRequestError(f"'prompt' has {len(items)} prompts, more than {MAX_PROMPTS}", "prompt")
    return [_one_prompt(item, request.add_special_tokens, model) for item in items]


def chat_prompt(request: ChatCompletionRequest, model: ServedModel) -> list[int]:
    """Return the token ids of a chat, through the model's template."""
    _refuse_unsupported(request)
    if request.continue_final_message and request.add_generation_prompt and request.messages[-1].role != "assistant":
        raise InvalidRequestError("'continue_final_message' needs an assistant message at the end", "messages")
    text = render(
        request.messages,
        model,
        add_generation_prompt=request.add_generation_prompt and not request.continue_final_message,
        variables=request.chat_template_kwargs,
    )
    if request.continue_final_message:
        final = text_of(request.messages[-1])
        text = text[: text.rindex(final) + len(final)]
    return _checked(model.tokenizer.encode(text, add_special_tokens=request.add_special_tokens), model)


def render(
    messages: Sequence[ChatMessage],
    model: ServedModel,
    *,
    add_generation_prompt: bool,
    variables: dict[str, object] | None = None,
) -> str:
    """Return a chat as the model's template writes it."""
    plain = [
        {"role": message.role, "content": text_of(message), **({"name": message.name} if message.name else {})}
        for message in messages
    ]
    return model.chat_template.render(plain, add_generation_prompt=add_generation_prompt, variables=variables)


def tokenize_prompt(request: TokenizeRequest, model: ServedModel) -> list[int]:
    """Return the token ids that a prompt or a chat would have."""
    if (request.prompt is None) == (request.messages is None):
        raise InvalidRequestError("give either 'prompt' or 'messages'", "prompt")
    if request.messages is not None:
        text = render(request.messages, model, add_generation_prompt=request.add_generation_prompt)
        return model.tokenizer.encode(text, add_special_tokens=bool(request.add_special_tokens))
    special = request.add_special_tokens is None or request.add_special_tokens
    return model.tokenizer.encode(request.prompt or "", add_special_tokens=special)


def text_of(message: ChatMessage) -> str:
    """Return a message's text; parts that are not text are refused."""
    if message.content is None or isinstance(message.content, str):
        return message.content or ""
    for part in message.content:
        if part.type != "text" or part.text is None:
            raise InvalidRequestError(
                f"'messages': content of type '{part.type}' is not supported, only 'text'", "messages"
            )
    return "".join(part.text or "" for part in message.content)


def _refuse_unsupported(request: ChatCompletionRequest) -> None:
    if request.tools:
        raise InvalidRequestError("'tools' is not supported", "tools")
    if request.tool_choice not in (None, "none", "auto"):
        raise InvalidRequestError(f"'tool_choice' {request.tool_choice!r} is not supported", "tool_choice")
    if request.response_format is not None and request.response_format.get("type") != "text":
        kind = request.response_format.get("type")
        raise InvalidRequestError(
            f"'response_format' of type {kind!r} is not supported, only 'text'", "response_format"
        )


def _one_prompt(item: str | int | list[int], add_special_tokens: bool, model: ServedModel) -> list[int]:
    if isinstance(item, int):
        raise InvalidRequestError("'prompt' mixes token ids with texts or lists", "prompt")
    ids = item if isinstance(item, list) else model.tokenizer.encode(item, add_special_tokens=add_special_tokens)
    return _checked(ids, model)


def _checked(token_ids: list[int], model: ServedModel) -> list[int]:
    if not token_ids:
        raise InvalidRequestError("the prompt has no tokens: give at least one", "prompt")
    largest = max(token_ids)
    if largest >= model.vocab_size:
        raise InvalidRequestError(
            f"'prompt': token id {largest} is outside the vocabulary of {model.vocab_size}", "prompt"
        )
    return token_ids
