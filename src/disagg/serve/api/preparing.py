"""The work that a body asks for before anything is generated: decode, render, tokenise, name KV blocks.

All of it is a function of body and model, so that it can be done in any process.
"""

import enum
from typing import Final

import msgspec

from disagg.base.errors import InvalidRequestError, ModelNotFoundError
from disagg.serve.api.decoding import decode_body
from disagg.serve.api.prompts import Prompt, chat_prompt, completion_prompts, tokenize_prompt
from disagg.serve.api.responses import Detokenized, Tokenized
from disagg.serve.api.schema import (
    MAX_PROMPT_LOGPROBS,
    ChatCompletionRequest,
    ChatMessage,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from disagg.serve.api.served_model import ServedModel

_MAX_NAME: Final = 200
_NO_MESSAGES = [ChatMessage(role="")]


class Task(enum.IntEnum):
    """What a body is for."""

    COMPLETION = 0
    CHAT = 1
    TOKENIZE = 2
    DETOKENIZE = 3


class PreparedCompletion(msgspec.Struct, frozen=True, array_like=True):
    """A body of ``/v1/completions``. ``request`` has everything but its prompt."""

    request: CompletionRequest
    prompts: tuple[Prompt, ...]


class PreparedChat(msgspec.Struct, frozen=True, array_like=True):
    """A body of ``/v1/chat/completions``. ``request`` has everything but its messages and its template."""

    request: ChatCompletionRequest
    prompt: Prompt


def prepare_completion(body: bytes, model: ServedModel, max_model_len: int) -> PreparedCompletion:
    """Read a ``/v1/completions`` body. Raises InvalidRequestError and ModelNotFoundError."""
    request = decode_body(body, CompletionRequest)
    check_model(request.model, model)
    prompts = completion_prompts(request, model, max_model_len)
    if request.echo and request.logprobs is not None:
        _check_prompt_logprobs(sum(len(prompt.token_ids) for prompt in prompts), request.n or 1, request.logprobs)
    return PreparedCompletion(msgspec.structs.replace(request, prompt=""), tuple(prompts))


def prepare_chat(body: bytes, model: ServedModel, max_model_len: int) -> PreparedChat:
    """Read a ``/v1/chat/completions`` body. Raises InvalidRequestError and ModelNotFoundError."""
    request = decode_body(body, ChatCompletionRequest)
    check_model(request.model, model)
    prompt = chat_prompt(request, model, max_model_len)
    rest = msgspec.structs.replace(request, messages=_NO_MESSAGES, chat_template=None, chat_template_kwargs=None)
    return PreparedChat(rest, prompt)


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
            f"'logprobs' of {num_tokens} echoed tokens, {num_choices} choices and {num_top} alternatives are "
            f"{num_asked} probabilities, more than {MAX_PROMPT_LOGPROBS}: ask for fewer",
            "logprobs",
        )
