"""What ``/v1/responses`` answers: OpenAI's items and events as structs."""

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from disagg.serve.api.responses import ErrorBody


class OutputText(msgspec.Struct, frozen=True):
    """Text of the answer, or of its reasoning."""

    text: str
    type: str = "output_text"
    annotations: list[str] | UnsetType = UNSET


class MessageItem(msgspec.Struct, frozen=True, kw_only=True):
    """The answer's text."""

    id: str
    content: list[OutputText]
    status: str
    type: str = "message"
    role: str = "assistant"


class FunctionCallItem(msgspec.Struct, frozen=True, kw_only=True):
    """A call of a tool."""

    id: str
    call_id: str
    name: str
    arguments: str
    status: str
    type: str = "function_call"


class ReasoningItem(msgspec.Struct, frozen=True, kw_only=True):
    """What the model thought."""

    id: str
    content: list[OutputText]
    status: str
    type: str = "reasoning"
    summary: list[OutputText] = []


OutputItem = MessageItem | FunctionCallItem | ReasoningItem


class InputTokensDetails(msgspec.Struct, frozen=True):
    """As in chats."""

    cached_tokens: int


class OutputTokensDetails(msgspec.Struct, frozen=True):
    """Tokens are not told apart by what they became."""

    reasoning_tokens: int = 0


class ResponseUsage(msgspec.Struct, frozen=True):
    """Tokens of one response."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(msgspec.Struct, frozen=True):
    """Why an answer is not whole."""

    reason: str


class ResponseError(msgspec.Struct, frozen=True):
    """What ended a response after it had begun."""

    code: str
    message: str


class ModelResponse(msgspec.Struct, frozen=True, kw_only=True):
    """The response, with what was asked for as far as clients look for it."""

    id: str
    created_at: int
    model: str
    status: str
    output: list[OutputItem]
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    temperature: float
    top_p: float
    text: Any
    tool_choice: Any
    tools: list[Any]
    truncation: str
    usage: ResponseUsage | None = None
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    object: str = "response"
    previous_response_id: str | None = None
    store: bool = False


class ResponseEvent(msgspec.Struct, frozen=True, kw_only=True):
    """The response as a whole, at its beginning or end."""

    type: str
    sequence_number: int
    response: ModelResponse


class ItemEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An item begins or ends."""

    type: str
    sequence_number: int
    output_index: int
    item: OutputItem


class PieceEvent(msgspec.Struct, frozen=True, kw_only=True):
    """Something of an item: a part that begins or ends, more of its text or arguments, or all of them."""

    type: str
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int | UnsetType = UNSET
    part: OutputText | UnsetType = UNSET
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    logprobs: list[str] | UnsetType = UNSET


class ErrorEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An error after the status was sent. ``error`` is as in the other endpoints."""

    sequence_number: int
    message: str
    code: str | None
    error: ErrorBody
    param: str | None = None
    type: str = "error"
