"""What clients send, field by field, and how it is read: bounds are checked before anything else happens.

Names and meanings are OpenAI's; the sampling extras are spelled as in vLLM. A field that is in no struct and in none
of the two tables is refused by name: to ignore one silently could change the answer. Every refusal names the field, the
value and what would do.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import Meta

from disagg.base.errors import InvalidRequestError

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


# Reading a body ---------------------------------------------------------------------------------------------------

Body = TypeVar("Body", bound=msgspec.Struct)

_PATH: Final = re.compile(r"^(?P<what>.*?) - at `(?:key` in `)?\$(?P<path>.*)`$", re.DOTALL)
_UNKNOWN: Final = re.compile(r"^Object contains unknown field `(?P<name>.*?)`")
_MISSING: Final = re.compile(r"^Object missing required field `(?P<name>.*?)`")
_STEP: Final = re.compile(r"\.(?P<name>\w+)|\[(?P<index>\d+|\.\.\.)\]")
_MAX_SHOWN: Final = 80
_NULL: Final = msgspec.Raw(b"null")
_NONE: Final = msgspec.Raw(b'"none"')
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])


def decode_body(data: bytes, kind: type[Body]) -> Body:
    """Decode a JSON body by schema.

    Raises InvalidRequestError naming field and value; also for a field that is not in the schema, unless it is
    known never to change an answer, is null, or has the value that stands for not using it.
    """
    try:
        fields = _fields.decode(data)
        for name in fields.keys() - set(kind.__struct_fields__) - IGNORED:
            _check_unused(name, fields)
        return _decode(data, kind)
    except msgspec.ValidationError as error:
        raise _refusal(str(error), data) from None
    except msgspec.DecodeError as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequestError(f"the body cannot be read: {error}") from None


def _decode(data: bytes, kind: type[Body]) -> Body:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        if not _UNKNOWN.match(str(error)):
            raise
        return msgspec.convert(_without_unused(msgspec.json.decode(data)), kind)


def _without_unused(body: dict[str, Any]) -> dict[str, Any]:
    """Return a body without the fields inside of its fields that stand for not using them."""
    messages, options = body.get("messages"), body.get("stream_options")
    if isinstance(messages, list):
        known = ChatMessage.__struct_fields__
        body["messages"] = [_used(message, known, NEUTRAL_IN_MESSAGES) for message in messages]
    if options is not None:
        body["stream_options"] = _used(options, StreamOptions.__struct_fields__, {})
    return body


def _used(value: object, known: tuple[str, ...], neutral: Mapping[str, tuple[object, ...]]) -> object:
    if not isinstance(value, dict):
        return value
    return {
        name: one for name, one in value.items() if name in known or not (one is None or one in neutral.get(name, ()))
    }


def _check_unused(name: str, fields: Mapping[str, msgspec.Raw]) -> None:
    if fields[name] == _NULL or (name in UNUSED_WITH_NONE and fields.get(UNUSED_WITH_NONE[name]) == _NONE):
        return
    if name not in NEUTRAL:
        raise InvalidRequestError(f"unknown parameter '{name}': this server does not have it, leave it out", name)
    value = msgspec.json.decode(fields[name])
    if value in NEUTRAL[name]:
        return
    remedy = " or ".join(["leave it out", *(f"give {_abridged(neutral)}" for neutral in NEUTRAL[name])])
    raise InvalidRequestError(f"'{name}' is not supported, got {_abridged(value)}: {remedy}", name)


def _refusal(message: str, data: bytes) -> InvalidRequestError:
    match = _PATH.match(message)
    what, path = (match["what"], match["path"]) if match else (message, "")
    name = path.lstrip(".")
    if unknown := _UNKNOWN.match(what):
        field = _join(name, unknown["name"])
        return InvalidRequestError(f"unknown parameter '{field}': this server does not have it, leave it out", field)
    if missing := _MISSING.match(what):
        field = _join(name, missing["name"])
        return InvalidRequestError(f"missing parameter '{field}'", field)
    if not name:
        return InvalidRequestError(f"the body must be a JSON object: {what.replace('`', '')}")
    what = what[0].lower() + what[1:].replace("`", "")
    return InvalidRequestError(f"'{name}': {what}{_shown(data, path)}", name.split(".")[0].split("[")[0])


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _shown(data: bytes, path: str) -> str:
    """Return the offending value, cut short, when the path leads to exactly one."""
    try:
        value: Any = msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return ""
    for step in _STEP.finditer(path):
        try:
            value = value[step["name"]] if step["name"] else value[int(step["index"])]
        except (KeyError, IndexError, TypeError, ValueError):
            return ""
    return f", got {_abridged(value)}"


def _abridged(value: object) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."
