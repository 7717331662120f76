"""From what a client asked to the complete sampling parameters of its sequences."""

import secrets
from typing import Final

import msgspec

from disagg.base.errors import ConfigurationError, ContextLengthError, InvalidRequestError
from disagg.base.sampling import SamplingParams
from disagg.models.generation_config import GenerationDefaults
from disagg.serve.api.schema import ChatCompletionRequest, CompletionRequest, GenerationFields

DEFAULT_COMPLETION_TOKENS: Final = 16
_SEED_BITS: Final = 64
_MAX_ID_DIGITS: Final = 20
_LIMIT: Final = "this model's maximum context length is {} tokens, prompt and answer together"
_NO_DEFAULTS: Final = GenerationDefaults()


class TokenConstraints(msgspec.Struct, frozen=True, array_like=True):
    """What the tokens of an answer must keep to, as ``SamplingParams`` has it."""

    grammar: str = ""
    bad_words: tuple[tuple[int, ...], ...] = ()


_NO_CONSTRAINTS: Final = TokenConstraints()


def check_defaults(defaults: GenerationDefaults, source: str) -> None:
    """Raise ConfigurationError for a default that a client could not have sent either."""
    try:
        msgspec.convert(msgspec.structs.asdict(defaults), GenerationFields)
    except msgspec.ValidationError as error:
        raise ConfigurationError(
            f"{source}: {error}: {defaults}; correct it, or ignore the file with --generation-config vllm"
        ) from error


def sampling_params(
    request: CompletionRequest | ChatCompletionRequest,
    max_tokens: int,
    vocab_size: int,
    defaults: GenerationDefaults = _NO_DEFAULTS,
    *,
    constraints: TokenConstraints = _NO_CONSTRAINTS,
) -> tuple[SamplingParams, ...]:
    """Return one set of parameters for each of the ``n`` choices; the choice k samples with seed + k.

    ``defaults`` are the model's, for fields that the client did not send.

    Here, where no seed was given, randomness enters the system. Raises InvalidRequestError on contradictions.
    """
    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        raise InvalidRequestError(f"'min_tokens' is {min_tokens}, above the {max_tokens} tokens allowed", "min_tokens")
    stop_token_ids = tuple(request.stop_token_ids or ())
    for token_id in stop_token_ids:
        _check_token(token_id, vocab_size, "stop_token_ids")
    allowed_token_ids = tuple(request.allowed_token_ids or ())
    for token_id in allowed_token_ids:
        _check_token(token_id, vocab_size, "allowed_token_ids")
    logprobs, prompt_logprobs = _logprobs(request)
    seed = secrets.randbits(_SEED_BITS) if request.seed is None else request.seed
    logit_bias = _logit_bias(request, vocab_size)
    return tuple(
        SamplingParams(
            max_tokens=max(max_tokens, 1),
            seed=(seed + choice) % (1 << _SEED_BITS),
            temperature=_or(request.temperature, defaults.temperature, 1.0),
            top_p=_or(request.top_p, defaults.top_p, 1.0),
            top_k=max(int(_or(request.top_k, defaults.top_k, 0)), 0),
            min_p=_or(request.min_p, defaults.min_p, 0.0),
            repetition_penalty=_or(request.repetition_penalty, defaults.repetition_penalty, 1.0),
            presence_penalty=_or(request.presence_penalty, 0.0),
            frequency_penalty=_or(request.frequency_penalty, 0.0),
            logit_bias=logit_bias,
            min_tokens=min_tokens,
            stop_token_ids=stop_token_ids,
            ignore_eos=bool(request.ignore_eos),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            grammar=constraints.grammar,
            bad_words=constraints.bad_words,
            allowed_token_ids=allowed_token_ids,
        )
        for choice in range(request.n or 1)
    )


def completion_length(
    request: CompletionRequest, num_prompt_tokens: int, limit: int, defaults: GenerationDefaults = _NO_DEFAULTS
) -> int:
    """Return how many tokens a completion may have; 0 when an echoed prompt alone is asked about.

    Raises ContextLengthError when prompt and answer do not fit ``limit`` tokens.
    """
    asked = request.most_tokens
    if asked == 0 and not request.echo:
        raise InvalidRequestError(
            "'max_tokens' is 0: ask for at least one token, or for the prompt itself with 'echo': true", "max_tokens"
        )
    return _fitting(num_prompt_tokens, asked, min(DEFAULT_COMPLETION_TOKENS, defaults.max_tokens or limit), limit)


def chat_length(
    request: ChatCompletionRequest, num_prompt_tokens: int, limit: int, defaults: GenerationDefaults = _NO_DEFAULTS
) -> int:
    """Return how many tokens an answer may have: all that fit, unless client or model say less. Raises as above."""
    asked = request.most_tokens
    if asked == 0:
        raise InvalidRequestError("'max_tokens' is 0: ask for at least one token", "max_tokens")
    return _fitting(num_prompt_tokens, asked, defaults.max_tokens or limit, limit)


def stop_strings(request: GenerationFields) -> tuple[str, ...]:
    """Return the stop strings; an empty one is refused, since it would stop every answer at once."""
    given = [] if request.stop is None else request.stop
    strings = (given,) if isinstance(given, str) else tuple(given)
    if "" in strings:
        raise InvalidRequestError("'stop' contains an empty string, which would end every answer at once", "stop")
    return strings


def check_fits(num_prompt_tokens: int, limit: int) -> None:
    """Raise ContextLengthError for a prompt that leaves no room for an answer in ``limit`` tokens."""
    # One token is always sampled, even where only the prompt's probabilities are wanted.
    if num_prompt_tokens >= limit:
        raise ContextLengthError(
            f"{_LIMIT.format(limit)}, but the prompt has {num_prompt_tokens} tokens: shorten it", "prompt"
        )


def _fitting(num_prompt_tokens: int, asked: int | None, default: int, limit: int) -> int:
    """Check a length that was asked for; cut the default one to what is left."""
    check_fits(num_prompt_tokens, limit)
    room = limit - num_prompt_tokens
    if asked is not None and asked > room:
        raise ContextLengthError(
            f"{_LIMIT.format(limit)}, but the prompt has {num_prompt_tokens} tokens and {asked} more were asked for: "
            f"ask for at most {room}",
            "max_tokens",
        )
    return min(default, room) if asked is None else asked


def _logprobs(request: CompletionRequest | ChatCompletionRequest) -> tuple[int | None, int | None]:
    """Return how many alternatives are wanted for each token of the answer, and of the prompt."""
    of_prompt = request.prompt_logprobs
    if of_prompt is not None and request.stream:
        raise InvalidRequestError("'prompt_logprobs' come with whole answers alone: leave 'stream' out", "stream")
    if isinstance(request, CompletionRequest):
        if request.echo and request.logprobs is not None:
            of_prompt = max(request.logprobs, of_prompt or 0)
        return request.logprobs, of_prompt
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequestError("'top_logprobs' needs 'logprobs': true", "top_logprobs")
    return (request.top_logprobs or 0) if request.logprobs else None, of_prompt


def _logit_bias(request: GenerationFields, vocab_size: int) -> tuple[tuple[int, float], ...]:
    found: dict[int, tuple[str, float]] = {}
    for text, bias in (request.logit_bias or {}).items():
        if not text.isascii() or not text.isdigit() or len(text) > _MAX_ID_DIGITS:
            raise InvalidRequestError(f"'logit_bias' must be keyed by token ids, got {text[:80]!r}", "logit_bias")
        token_id = int(text)
        _check_token(token_id, vocab_size, "logit_bias")
        if token_id in found:
            raise InvalidRequestError(
                f"'logit_bias' has token {token_id} twice, as {found[token_id][0]!r} and {text!r}: give it once",
                "logit_bias",
            )
        found[token_id] = (text, bias)
    return tuple((token_id, bias) for token_id, (_, bias) in sorted(found.items()))


def _check_token(token_id: int, vocab_size: int, param: str) -> None:
    if token_id >= vocab_size:
        raise InvalidRequestError(f"'{param}': token id {token_id} is outside the vocabulary of {vocab_size}", param)


def _or(*values: float | None) -> float:
    """Return the first that is stated."""
    return next(value for value in values if value is not None)
