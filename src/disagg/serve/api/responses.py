"""What the API answers: OpenAI's shapes as structs, so that a streamed event costs one encoding."""

import secrets
from collections.abc import Callable
from typing import Any, Final

import msgspec
from msgspec import UNSET, UnsetType
from starlette.responses import Response

# Answers and events -----------------------------------------------------------------------------------------------


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """Of the prompt's tokens, those whose KV blocks were already there."""

    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one request."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """The legacy form: parallel lists over tokens. The first token of an echoed prompt has no probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(msgspec.Struct, frozen=True):
    """One likely token in the place of a prompt's token."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""vLLM's: for each token of a prompt the likely ones by id, null for the first, which nothing came before."""


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One text of ``/v1/completions``, or a piece of it in a stream. Token ids are there when asked for."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None
    token_ids: tuple[int, ...] | UnsetType = UNSET
    prompt_token_ids: tuple[int, ...] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


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


class CalledFunction(msgspec.Struct, frozen=True):
    """What is called, or a piece of it. ``arguments`` are JSON."""

    name: str | UnsetType
    arguments: str


class ToolCall(msgspec.Struct, frozen=True):
    """One call of a tool."""

    id: str
    function: CalledFunction
    type: str = "function"


class ToolCallDelta(msgspec.Struct, frozen=True):
    """What an event adds to call ``index``: id, type and name the first time, then arguments."""

    index: int
    function: CalledFunction
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET


class AssistantMessage(msgspec.Struct, frozen=True):
    """The answer to a chat. ``content`` is None where there are calls alone."""

    role: str
    content: str | None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One answer of ``/v1/chat/completions``."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None
    token_ids: tuple[int, ...] | UnsetType = UNSET
    prompt_token_ids: tuple[int, ...] | UnsetType = UNSET


class MessageDelta(msgspec.Struct, frozen=True):
    """What an event adds to an answer."""

    content: str | UnsetType
    role: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of one answer in a stream."""

    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    token_ids: tuple[int, ...] | UnsetType = UNSET
    prompt_token_ids: tuple[int, ...] | UnsetType = UNSET


class Completion(msgspec.Struct, frozen=True):
    """An answer of either endpoint, or one event of its stream.

    ``prompt_token_ids`` and ``prompt_logprobs`` are those of a chat, where vLLM has them.
    """

    id: str
    object: str
    created: int
    model: str
    choices: list[CompletionChoice] | list[ChatChoice] | list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: tuple[int, ...] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


# Everything else --------------------------------------------------------------------------------------------------


class ErrorBody(msgspec.Struct, frozen=True):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


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


class Tokenized(msgspec.Struct, frozen=True):
    """``/tokenize``."""

    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(msgspec.Struct, frozen=True):
    """``/detokenize``."""

    prompt: str


DONE: Final = b"data: [DONE]\n\n"
"""The event that ends every stream."""

_encoder = msgspec.json.Encoder()


def encode(value: Any) -> bytes:
    """Return the JSON of a response struct."""
    return _encoder.encode(value)


def json_response(value: Any, status: int = 200) -> Response:
    """Return a response struct, or anything that JSON has a form for, as a response."""
    return Response(encode(value), status, media_type="application/json")


def event(value: Any) -> bytes:
    """Return one server-sent event."""
    return b"data: " + _encoder.encode(value) + b"\n\n"


class EventTemplate:
    """An event that is encoded once, and then again with other texts in the same place."""

    def __init__(self, make: Callable[[str], Any]) -> None:
        """``make`` returns the struct of an event with a text in one place."""
        mark = secrets.token_hex(16)
        self._before, self._after = event(make(mark)).split(encode(mark))

    def event(self, text: str) -> bytes:
        """Return the event with this text."""
        return self._before + encode(text) + self._after
