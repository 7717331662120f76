"""What a client asks about, as token ids: texts, token ids, chats."""

from collections.abc import Sequence

import msgspec

from disagg.base.block_hash import first_link, hash_blocks
from disagg.base.errors import ConfigurationError, ContextLengthError, InvalidRequestError
from disagg.base.ids import BlockHash
from disagg.models.chat_template import ChatTemplate
from disagg.serve.api.sampling import check_fits
from disagg.serve.api.schema import (
    MAX_PROMPTS,
    MAX_SEQUENCES,
    MAX_TOKENS_OF_ALL_PROMPTS,
    ChatCompletionRequest,
    ChatMessage,
    CompletionRequest,
    GenerationFields,
    TokenizeRequest,
)
from disagg.serve.api.served_model import ServedModel


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
        token_ids = model.tokenizer.encode(given, add_special_tokens=request.add_special_tokens is not False)
        return _prompt(token_ids, given if request.echo else None, request, model, max_model_len)
    prompt = _prompt(given, None, request, model, max_model_len)
    if not request.echo:
        return prompt
    text = model.tokenizer.decode(given, skip_special_tokens=request.skip_special_tokens is not False)
    return msgspec.structs.replace(prompt, text=text)


def chat_prompt(request: ChatCompletionRequest, model: ServedModel, max_model_len: int) -> Prompt:
    """Return a chat as the model's template writes it."""
    return _prompt(_chat_tokens(request.messages, request, model, max_model_len), None, request, model, max_model_len)


def tokenize_prompt(request: TokenizeRequest, model: ServedModel, max_model_len: int | None) -> list[int]:
    """Return the token ids that a prompt or a chat would have."""
    if request.messages is not None and request.prompt is None:
        return _checked(_chat_tokens(request.messages, request, model, max_model_len), model)
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


def _chat_tokens(
    messages: Sequence[ChatMessage],
    fields: ChatCompletionRequest | TokenizeRequest,
    model: ServedModel,
    max_model_len: int | None,
) -> list[int]:
    text = _render(messages, fields, model)
    check_bytes(text, "messages", model, max_model_len)
    return model.tokenizer.encode(text, add_special_tokens=bool(fields.add_special_tokens))


def _render(
    messages: Sequence[ChatMessage], fields: ChatCompletionRequest | TokenizeRequest, model: ServedModel
) -> str:
    if fields.continue_final_message and fields.add_generation_prompt:
        raise InvalidRequestError(
            "'continue_final_message' and 'add_generation_prompt' exclude each other: give one of them",
            "continue_final_message",
        )
    template = model.chat_template if fields.chat_template is None else _own_template(fields.chat_template, model)
    plain = [_plain(message, index) for index, message in enumerate(messages)]
    variables = fields.chat_template_kwargs
    if fields.continue_final_message:
        return template.render_continued(plain, variables=variables)
    begins_answer = fields.add_generation_prompt is not False
    return template.render(plain, add_generation_prompt=begins_answer, variables=variables)


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


def _prompt(
    token_ids: list[int], text: str | None, request: GenerationFields, model: ServedModel, max_model_len: int
) -> Prompt:
    check_fits(len(token_ids), max_model_len)
    names = hash_blocks(token_ids, model.block_size, first_link(request.cache_salt or ""))
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
