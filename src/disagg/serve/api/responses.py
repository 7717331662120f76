"""What the API answers: OpenAI's shapes as structs, so that a streamed event costs one encoding."""

from typing import Any

import msgspec


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """Of the prompt's tokens, those whose KV blocks were already there."""

    cached_tokens: int


class Usage(msgspec.Struct, frozen=True, omit_defaults=True):
    """Tokens of one request."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """The legacy form: parallel lists over tokens. The first token of an echoed prompt has no probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True):
    """One text of ``/v1/completions``, or a piece of it in a stream."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None


class Completion(msgspec.Struct, frozen=True, omit_defaults=True):
    """Answer, or one event, of ``/v1/completions``."""

    id: str
    object: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(msgspec.Struct, frozen=True):
    """One likely token."""

    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(msgspec.Struct, frozen=True):
    """One token of an answer, with the likely ones in its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """Log probabilities of an answer's tokens."""

    content: list[ContentLogprob]


class AssistantMessage(msgspec.Struct, frozen=True):
    """The answer to a chat."""

    role: str
    content: str


class ChatChoice(msgspec.Struct, frozen=True):
    """One answer of ``/v1/chat/completions``."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None


class MessageDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an event adds to an answer."""

    role: str | None = None
    content: str | None = None


class ChatChunkChoice(msgspec.Struct, frozen=True):
    """A piece of one answer in a stream."""

    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None = None


class ChatCompletion(msgspec.Struct, frozen=True, omit_defaults=True):
    """Answer, or one event, of ``/v1/chat/completions``."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice] | list[ChatChunkChoice]
    usage: Usage | None = None


class ErrorBody(msgspec.Struct, frozen=True):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorResponse(msgspec.Struct, frozen=True):
    """What every refusal looks like."""

    error: ErrorBody


class ModelCard(msgspec.Struct, frozen=True):
    """One entry of ``/v1/models``."""

    id: str
    created: int
    max_model_len: int | None
    object: str = "model"
    owned_by: str = "disagg"


class ModelList(msgspec.Struct, frozen=True):
    """``/v1/models``."""

    data: list[ModelCard]
    object: str = "list"


class Tokenized(msgspec.Struct, frozen=True, omit_defaults=True):
    """``/tokenize``."""

    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(msgspec.Struct, frozen=True):
    """``/detokenize``."""

    prompt: str


_encoder = msgspec.json.Encoder()


def encode(value: Any) -> bytes:
    """Return the JSON of a response struct."""
    return _encoder.encode(value)


def event(value: Any) -> bytes:
    """Return one server-sent event."""
    return b"data: " + _encoder.encode(value) + b"\n\n"


DONE = b"data: [DONE]\n\n"
