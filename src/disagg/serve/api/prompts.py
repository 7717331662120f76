"""What a client asks about, as token ids: texts, token ids, chats."""

from collections.abc import Sequence
from dataclasses import dataclass

from disagg.base.errors import ConfigurationError, InvalidRequestError
from disagg.models.chat_template import ChatTemplate
from disagg.serve.api.schema import MAX_PROMPTS, ChatCompletionRequest, ChatMessage, CompletionRequest, TokenizeRequest
from disagg.serve.api.served_model import ServedModel


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt. ``text`` is known where it came as text, and is then what an echo shows."""

    token_ids: tuple[int, ...]
    text: str | None = None


def completion_prompts(request: CompletionRequest, model: ServedModel) -> list[Prompt]:
    """Return each prompt of a completion request."""
    given = request.prompt
    items: Sequence[str | int | list[int]] = [given] if isinstance(given, str) else given
    if not items:
        raise InvalidRequestError("'prompt' is an empty list: give at least one prompt", "prompt")
    if isinstance(items[0], int):
        token_ids = [item for item in items if isinstance(item, int)]
        if len(token_ids) != len(items):
            raise _mixed()
        return [Prompt(_checked(token_ids, model))]
    if len(items) > MAX_PROMPTS:
        raise InvalidRequestError(f"'prompt' has {len(items)} prompts, more than {MAX_PROMPTS}: send fewer", "prompt")
    return [_one_prompt(item, request.add_special_tokens is not False, model) for item in items]


def chat_prompt(
    messages: Sequence[ChatMessage], fields: ChatCompletionRequest | TokenizeRequest, model: ServedModel
) -> Prompt:
    """Return a chat as the model's template writes it."""
    text = _render(messages, fields, model)
    return Prompt(_checked(model.tokenizer.encode(text, add_special_tokens=bool(fields.add_special_tokens)), model))


def tokenize_prompt(request: TokenizeRequest, model: ServedModel) -> list[int]:
    """Return the token ids that a prompt or a chat would have."""
    if request.messages is not None and request.prompt is None:
        return list(chat_prompt(request.messages, request, model).token_ids)
    if request.prompt is None or request.messages is not None:
        raise InvalidRequestError("give either 'prompt' or 'messages'", "prompt")
    return model.tokenizer.encode(request.prompt, add_special_tokens=request.add_special_tokens is not False)


def _render(
    messages: Sequence[ChatMessage], fields: ChatCompletionRequest | TokenizeRequest, model: ServedModel
) -> str:
    continued = bool(fields.continue_final_message)
    if continued and fields.add_generation_prompt:
        raise InvalidRequestError(
            "'continue_final_message' and 'add_generation_prompt' exclude each other: give one of them",
            "continue_final_message",
        )
    template = model.chat_template if fields.chat_template is None else _own_template(fields.chat_template, model)
    plain = [_plain(message, index) for index, message in enumerate(messages)]
    begins_answer = fields.add_generation_prompt is not False and not continued
    text = template.render(plain, add_generation_prompt=begins_answer, variables=fields.chat_template_kwargs)
    return _cut_after(text, plain[-1]["content"]) if continued else text


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


def _plain(message: ChatMessage, index: int) -> dict[str, str]:
    """Return a message as templates know it. OpenAI's ``developer`` is what models have learned as ``system``."""
    role = "system" if message.role == "developer" else message.role
    plain = {"role": role, "content": _text(message, index)}
    if message.name is not None:
        plain["name"] = message.name
    if message.reasoning_content is not None:
        plain["reasoning_content"] = message.reasoning_content
    return plain


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


def _cut_after(text: str, final: str) -> str:
    """Drop what the template wrote after the final message, as transformers does; it may have stripped that."""
    start = text.rfind(final.strip())
    if start < 0 or not final.strip():
        raise InvalidRequestError("'continue_final_message': the chat template does not show the message", "messages")
    whole = final.lstrip()
    return text[: start + len(whole if text.startswith(whole, start) else final.strip())]


def _one_prompt(item: str | int | list[int], add_special_tokens: bool, model: ServedModel) -> Prompt:
    if isinstance(item, str):
        token_ids = model.tokenizer.encode(item, add_special_tokens=add_special_tokens)
        return Prompt(_checked(token_ids, model), item)
    if isinstance(item, int):
        raise _mixed()
    return Prompt(_checked(item, model))


def _mixed() -> InvalidRequestError:
    return InvalidRequestError("'prompt' mixes token ids with texts or lists: send one kind", "prompt")


def _checked(token_ids: list[int], model: ServedModel) -> tuple[int, ...]:
    if not token_ids:
        raise InvalidRequestError("the prompt has no tokens: give at least one", "prompt")
    largest = max(token_ids)
    if largest >= model.vocab_size:
        raise InvalidRequestError(
            f"'prompt': token id {largest} is outside the vocabulary of {model.vocab_size}", "prompt"
        )
    return tuple(token_ids)
