"""The work that a body asks for before anything is generated: decode, render, tokenise, name KV blocks.

All of it is a function of body and model, so that it can be done in any process.
"""

import enum
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import msgspec

from disagg.base.errors import InvalidRequestError, ModelNotFoundError
from disagg.serve.api.answer_grammar import answer_part, written
from disagg.serve.api.prompts import Prompt, chat_prompt, completion_prompts, tokenize_prompt
from disagg.serve.api.reading import AnswerReading
from disagg.serve.api.responses import Detokenized, Tokenized
from disagg.serve.api.responses_api.as_chat import as_chat, in_own_words
from disagg.serve.api.responses_api.schema import ResponsesRequest
from disagg.serve.api.schema import (
    MAX_PROMPT_LOGPROBS,
    ChatCompletionRequest,
    ChatMessage,
    CompletionRequest,
    DetokenizeRequest,
    GenerationFields,
    TokenizeRequest,
    decode_body,
)
from disagg.serve.api.served_model import ServedModel

Generation = TypeVar("Generation", bound=GenerationFields)

_CONSTRAINT_FIELDS: Final = (
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "bad_words",
)
_GRAMMAR_NAMES: Final = (b"response_format", b"structured_outputs", b"guided_")
_MAX_NAME: Final = 200
_NO_MESSAGES = [ChatMessage(role="")]


class Task(enum.IntEnum):
    """What a body is for."""

    COMPLETION = 0
    CHAT = 1
    TOKENIZE = 2
    DETOKENIZE = 3
    RESPONSE = 4


class TokenConstraints(msgspec.Struct, frozen=True, array_like=True):
    """What the tokens of an answer must keep to, as ``SamplingParams`` has it."""

    grammar: str = ""
    bad_words: tuple[tuple[int, ...], ...] = ()


class PreparedCompletion(msgspec.Struct, frozen=True, array_like=True):
    """A body of ``/v1/completions``. ``request`` has everything but its prompt and its constraints."""

    request: CompletionRequest
    prompts: tuple[Prompt, ...]
    constraints: TokenConstraints


class PreparedChat(msgspec.Struct, frozen=True, array_like=True):
    """A body of ``/v1/chat/completions``. ``request`` has everything but what has gone into the other fields."""

    request: ChatCompletionRequest
    prompt: Prompt
    constraints: TokenConstraints
    reading: AnswerReading


class PreparedResponse(msgspec.Struct, frozen=True, array_like=True):
    """A body of ``/v1/responses``, and the chat that it is."""

    request: ResponsesRequest
    chat: PreparedChat


def prepare_completion(body: bytes, model: ServedModel, max_model_len: int) -> PreparedCompletion:
    """Read a ``/v1/completions`` body. Raises InvalidRequestError and ModelNotFoundError."""
    request = decode_body(body, CompletionRequest)
    check_model(request.model, model)
    with _valid_unicode():
        part = answer_part(request)
        bad_words = _bad_words(request, model)
    prompts = completion_prompts(request, model, max_model_len)
    num_top = max(request.logprobs or 0 if request.echo else 0, request.prompt_logprobs or 0)
    if (request.echo and request.logprobs is not None) or request.prompt_logprobs is not None:
        _check_prompt_logprobs(sum(len(prompt.token_ids) for prompt in prompts), request.n or 1, num_top)
    constraints = TokenConstraints("" if part is None else written(part), bad_words)
    return PreparedCompletion(_rest(request, prompt=""), tuple(prompts), constraints)


def prepare_chat(body: bytes, model: ServedModel, max_model_len: int) -> PreparedChat:
    """Read a ``/v1/chat/completions`` body. Raises InvalidRequestError and ModelNotFoundError."""
    return _prepared(decode_body(body, ChatCompletionRequest), model, max_model_len)


def prepare_response(body: bytes, model: ServedModel, max_model_len: int) -> PreparedResponse:
    """Read a ``/v1/responses`` body. Raises InvalidRequestError and ModelNotFoundError."""
    request = decode_body(body, ResponsesRequest)
    try:
        chat = _prepared(as_chat(request), model, max_model_len)
    except InvalidRequestError as error:
        raise in_own_words(error) from error
    return PreparedResponse(_rest(request, input=""), chat)


def _prepared(request: ChatCompletionRequest, model: ServedModel, max_model_len: int) -> PreparedChat:
    check_model(request.model, model)
    with _valid_unicode():
        chat = chat_prompt(request, model, max_model_len)
    if request.prompt_logprobs is not None:
        _check_prompt_logprobs(len(chat.prompt.token_ids), request.n or 1, request.prompt_logprobs)
    rest = _rest(request, messages=_NO_MESSAGES, chat_template=None, chat_template_kwargs=None, tools=None)
    constraints = TokenConstraints(chat.grammar, _bad_words(request, model))
    return PreparedChat(rest, chat.prompt, constraints, chat.reading)


@contextmanager
def _valid_unicode() -> Iterator[None]:
    """Refuse what holds half of a surrogate pair, which JSON may have in any of its texts."""
    try:
        yield
    except UnicodeEncodeError as error:
        raise InvalidRequestError(f"the request is not valid Unicode: {error.reason}") from None


def may_need_grammar(body: bytes) -> bool:
    """Return whether a body has a name that asks for a grammar: then preparing it may take longer than it is long."""
    return any(name in body for name in _GRAMMAR_NAMES)


def _rest(request: Generation, **changes: Any) -> Generation:
    """Return a request without what has become constraints, and with ``changes``."""
    return msgspec.structs.replace(request, **dict.fromkeys(_CONSTRAINT_FIELDS), **changes)


def _bad_words(request: GenerationFields, model: ServedModel) -> tuple[tuple[int, ...], ...]:
    """Return the token sequences of ``bad_words``: each as it is written after a space, and without one, as in vLLM."""
    found: dict[tuple[int, ...], None] = {}
    for word in request.bad_words or ():
        bare = word.lstrip(" ")
        plain = tuple(model.tokenizer.encode(bare, add_special_tokens=False))
        spaced = tuple(model.tokenizer.encode(f" {bare}", add_special_tokens=False))
        if not word.startswith(" ") and plain:
            found[plain] = None
        # Where the space is a token of its own, the other spelling has it.
        is_other_spelling = len(spaced) == len(plain) and spaced[:1] != plain[:1]
        if spaced and (word.startswith(" ") or is_other_spelling):
            found[spaced] = None
    return tuple(found)


def tokenize(body: bytes, model: ServedModel, max_model_len: int | None) -> Tokenized:
    """Answer a ``/tokenize`` body. Raises InvalidRequestError and ModelNotFoundError."""
    request = decode_body(body, TokenizeRequest)
    check_model(request.model, model)
    tokens = tokenize_prompt(request, model, max_model_len)
    texts = [model.tokenizer.token_text(token) for token in tokens] if request.return_token_strs else None
    return Tokenized(len(tokens), max_model_len, tokens, texts)


def detokenize(body: bytes, model: ServedModel, max_model_len: int | None) -> Detokenized:
    """Answer a ``/detokenize`` body. Raises InvalidRequestError and ModelNotFoundError."""
    request = decode_body(body, DetokenizeRequest)
    check_model(request.model, model)
    if max_model_len is not None and len(request.tokens) > max_model_len:
        raise InvalidRequestError(
            f"'tokens' has {len(request.tokens)} tokens, but this model's maximum context length is {max_model_len}: "
            "send fewer",
            "tokens",
        )
    largest = max(request.tokens, default=0)
    if largest >= model.vocab_size:
        raise InvalidRequestError(
            f"'tokens': token id {largest} is outside the vocabulary of {model.vocab_size}", "tokens"
        )
    return Detokenized(model.tokenizer.decode(request.tokens, skip_special_tokens=False))


def check_model(name: str | None, model: ServedModel) -> None:
    """Raise ModelNotFoundError for a name that is not served; no name means the model that is."""
    if name is not None and name != model.name:
        raise ModelNotFoundError(f"the model '{name[:_MAX_NAME]}' is not served here, only '{model.name}'")


def _check_prompt_logprobs(num_tokens: int, num_choices: int, num_top: int) -> None:
    if (num_asked := num_tokens * num_choices * (num_top + 1)) > MAX_PROMPT_LOGPROBS:
        raise InvalidRequestError(
            f"'logprobs' of {num_tokens} tokens of the prompt, {num_choices} choices and {num_top} alternatives are "
            f"{num_asked} probabilities, more than {MAX_PROMPT_LOGPROBS}: ask for fewer",
            "logprobs",
        )
