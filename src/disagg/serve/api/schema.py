"""What clients send, field by field, with the bounds that are checked before anything else happens.

Names and meanings are OpenAI's; the sampling extras are spelled as in vLLM. A field that is in no struct and in none
of the two tables is refused by name: to ignore one silently could change the answer.
"""

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

MAX_CHOICES: Final = 64
MAX_STOP_STRINGS: Final = 16
MAX_LOGPROBS: Final = 20
MAX_PROMPTS: Final = 256
MAX_SEQUENCES: Final = 1024
"""Choices of all prompts of one request."""
MAX_TOKENS_OF_ALL_PROMPTS: Final = 1 << 21
"""Or those of one prompt, where the model takes longer ones."""
MAX_PROMPT_LOGPROBS: Final = 1 << 20
"""Probabilities of prompt tokens in one answer."""
MAX_MESSAGES: Final = 4096
MAX_TOOLS: Final = 128

IGNORED: Final = frozenset(
    {
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",
        "guided_decoding_backend",
    }
)
"""Parameters that never change what the model writes, whatever their value."""

NEUTRAL: Final[dict[str, tuple[object, ...]]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "best_of": (1,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "early_stopping": (False,),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": ("medium",),
    "web_search_options": (),
    "logits_processors": ([],),
    "documents": ([],),
    "detokenize": (True,),
    "spaces_between_special_tokens": (True,),
    "include_reasoning": (True,),
    "return_tokens_as_token_ids": (False,),
    "extra_body": ({},),
    "previous_response_id": (),
    "conversation": (),
    "background": (False,),
    "max_tool_calls": (),
}
"""Parameters that are not supported, with the values (beside null) that stand for not using them."""

UNUSED_WITH_NONE: Final = {"tools": "tool_choice", "functions": "function_call"}
"""What is sent for nothing where the other parameter is ``"none"``."""

NEUTRAL_IN_MESSAGES: Final[dict[str, tuple[object, ...]]] = {
    "refusal": ("",),
    "audio": (),
    "function_call": (),
    "annotations": ([],),
    "prefix": (False,),
}
"""As ``NEUTRAL``, for a message: an answer that is sent back carries such fields."""

Probability = Annotated[float, Meta(gt=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
MAX_TENANT_CHARACTERS: Final = 128
"""of a ``user``; what is longer is told apart by its beginning."""
MAX_OBJECTIVE_MS: Final = 86_400_000
NumTokens = Annotated[int, Meta(ge=0, le=2**63 - 1)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
StopString = Annotated[str, Meta(max_length=1000)]


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a stream carries besides text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None
    """OpenAI pads events against eavesdroppers who measure them; here nothing is padded."""


class JsonSchemaFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A named schema; kept to whether ``strict`` or not."""

    name: Annotated[str, Meta(max_length=256)] | None = None
    schema: dict[str, Any] | bool | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """OpenAI's way to ask for JSON."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


Choices = Annotated[list[str], Meta(min_length=1, max_length=4096)]


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """vLLM's way to say what the answer has to be: one of these."""

    json: dict[str, Any] | bool | str | None = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None


class GenerationFields(msgspec.Struct, frozen=True, kw_only=True):
    """What both endpoints have in common."""

    model: str | None = None
    max_tokens: NumTokens | None = None
    max_completion_tokens: NumTokens | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Meta(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    """It multiplies or divides logits: further out they would leave the range of their type."""
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=1024)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=256)] | None = None
    min_tokens: NumTokens | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    priority: Annotated[int, Meta(ge=-(2**31), lt=2**31)] | None = None
    """Lower is served earlier, as in vLLM."""
    user: str | None = None
    """Users share fairly, where keys do not say who asks."""
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | bool | str | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    allowed_token_ids: Annotated[list[TokenId], Meta(min_length=1, max_length=1 << 18)] | None = None
    bad_words: Annotated[list[Annotated[str, Meta(min_length=1, max_length=1000)]], Meta(max_length=256)] | None = None
    prompt_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=2**31)] | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=1024)] | None = None
    """Only requests of the same salt share cached KV blocks, as in vLLM."""
    service_class: Annotated[str, Meta(min_length=1, max_length=64)] | None = None
    """One of the server's, for what the request does not say itself."""
    x_slo_ttft_ms: Annotated[float, Meta(gt=0, le=MAX_OBJECTIVE_MS)] | None = None
    x_slo_tpot_ms: Annotated[float, Meta(gt=0, le=MAX_OBJECTIVE_MS)] | None = None

    @property
    def most_tokens(self) -> int | None:
        """The longest answer that the client wants: ``max_completion_tokens`` before the older name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(GenerationFields, frozen=True, kw_only=True):
    """Body of ``/v1/completions``. ``prompt``: a text, a list of texts, token ids, or a list of token id lists."""

    prompt: str | list[str | TokenId | list[TokenId]]
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None


class FunctionDefinition(msgspec.Struct, frozen=True):
    """A tool. ``parameters`` is the JSON schema of its arguments; without one it has none."""

    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolDefinition(msgspec.Struct, frozen=True):
    """A tool that the model may call."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(msgspec.Struct, frozen=True):
    """A tool by its name."""

    name: str


class NamedToolChoice(msgspec.Struct, frozen=True):
    """The one tool that has to be called."""

    type: Literal["function"]
    function: NamedFunction


class MessageFunction(msgspec.Struct, frozen=True):
    """What was called. ``arguments`` are JSON, or already an object."""

    name: str
    arguments: str | dict[str, Any] = ""


class MessageToolCall(msgspec.Struct, frozen=True):
    """A call that an earlier answer has made."""

    function: MessageFunction
    id: str = ""
    type: Literal["function"] = "function"


class ContentPart(msgspec.Struct, frozen=True):
    """One part of a message's content; only text is served."""

    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One message of a chat."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: Annotated[list[MessageToolCall], Meta(max_length=MAX_TOOLS)] | None = None
    tool_call_id: str | None = None


Tools = Annotated[list[ToolDefinition], Meta(max_length=MAX_TOOLS)]
Messages = Annotated[list[ChatMessage], Meta(min_length=1, max_length=MAX_MESSAGES)]


class ChatCompletionRequest(GenerationFields, frozen=True, kw_only=True):
    """Body of ``/v1/chat/completions``. ``add_generation_prompt``: true unless the final message is continued."""

    messages: Messages
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of ``/tokenize``: a prompt, or a chat with the fields that decide how it is written."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of ``/detokenize``."""

    tokens: list[TokenId]
    model: str | None = None
