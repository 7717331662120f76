"""What clients send to ``/v1/responses``. Names and meanings are OpenAI's; sampling extras are those of the chats."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from disagg.serve.api.schema import MAX_LOGPROBS, MAX_MESSAGES, MAX_TOOLS, ContentPart, GenerationFields


class TextFormat(msgspec.Struct, frozen=True, kw_only=True):
    """As ``response_format``, without its nesting."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | bool | None = None
    strict: bool | None = None


class TextSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What text the answer is."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class FlatTool(msgspec.Struct, frozen=True, kw_only=True):
    """A tool, without the nesting of chats."""

    type: Literal["function"]
    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FlatToolChoice(msgspec.Struct, frozen=True, kw_only=True):
    """The one tool that has to be called."""

    type: Literal["function"]
    name: str


class InputItem(msgspec.Struct, frozen=True, kw_only=True):
    """One item of the conversation: which of the fields it has depends on its type."""

    type: str = "message"
    role: str | None = None
    content: str | list[ContentPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[ContentPart] | None = None


class ResponsesRequest(GenerationFields, frozen=True, kw_only=True):
    """Body of ``/v1/responses``. Nothing is stored, whatever ``store`` says."""

    input: str | Annotated[list[InputItem], Meta(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, le=2**63 - 1)] | None = None
    text: TextSettings | None = None
    tools: Annotated[list[FlatTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatToolChoice | None = None
    parallel_tool_calls: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    metadata: dict[str, str] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    include: list[str] | None = None
    reasoning: dict[str, Any] | None = None
    store: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
