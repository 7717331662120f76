"""From what a client asked to the complete sampling parameters of its sequences."""

import secrets

from disagg.base.errors import ContextLengthError, InvalidRequestError
from disagg.base.sampling import SamplingParams
from disagg.serve.api.schema import ChatCompletionRequest, CompletionRequest, GenerationFields

_SEEDS = 2**64


def sampling_params(
    request: CompletionRequest | ChatCompletionRequest, max_tokens: int, vocab_size: int
) -> tuple[SamplingParams, ...]:
    """Return one set of parameters for each of the ``n`` choices; the choice k samples with seed + k.

    Here, where no seed was given, randomness enters the system. Raises InvalidRequestError on contradictions.
    """
    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        raise InvalidRequestError(f"'min_tokens' is {min_tokens}, above the {max_tokens} tokens allowed", "min_tokens")
    stop_token_ids = tuple(request.stop_token_ids or ())
    for token_id in stop_token_ids:
        _check_token(token_id, vocab_size, "stop_token_ids")
    logprobs, prompt_logprobs = _logprobs(request)
    seed = secrets.randbelow(_SEEDS) if request.seed is None else request.seed
    return tuple(
        SamplingParams(
            max_tokens=max(max_tokens, 1),
            seed=(seed + choice) % _SEEDS,
            temperature=_or(request.temperature, 1.0),
            top_p=_or(request.top_p, 1.0),
            top_k=max(request.top_k or 0, 0),
            min_p=_or(request.min_p, 0.0),
            repetition_penalty=_or(request.repetition_penalty, 1.0),
            presence_penalty=_or(request.presence_penalty, 0.0),
            frequency_penalty=_or(request.frequency_penalty, 0.0),
            logit_bias=_logit_bias(request, vocab_size),
            min_tokens=min_tokens,
            stop_token_ids=stop_token_ids,
            ignore_eos=request.ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )
        for choice in range(request.n or 1)
    )


def answer_length(num_prompt_tokens: int, asked: int | None, default: int | None, limit: int) -> int:
    """Return how many tokens an answer may have: what was asked, or ``default``, or (None) all that fits.

    Raises ContextLengthError when prompt and answer do not fit ``limit`` tokens.
    """
    room = limit - num_prompt_tokens
    if room < 1 and not (asked == 0 and room == 0):
        raise ContextLengthError(
            f"the prompt has {num_prompt_tokens} tokens, but the model's limit is {limit} tokens for prompt and answer "
            "together: shorten the prompt",
            "prompt",
        )
    if asked is None:
        return room if default is None else min(default, room)
    if asked > room:
        raise ContextLengthError(
            f"the prompt has {num_prompt_tokens} tokens and {asked} more were asked for, but the model's limit is "
            f"{limit} tokens together: ask for at most {room}",
            "max_tokens",
        )
    return asked


def stop_strings(request: GenerationFields) -> tuple[str, ...]:
    """Return the stop strings; an empty one is refused, since it would stop every answer at once."""
    given = request.stop or []
    strings = (given,) if isinstance(given, str) else tuple(given)
    if "" in strings:
        raise InvalidRequestError("'stop' contains an empty string, which would end every answer at once", "stop")
    return strings


def _logprobs(request: CompletionRequest | ChatCompletionRequest) -> tuple[int | None, int | None]:
    if isinstance(request, CompletionRequest):
        return request.logprobs, request.logprobs if request.echo else None
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequestError("'top_logprobs' needs 'logprobs': true", "top_logprobs")
    return (request.top_logprobs or 0) if request.logprobs else None, None


def _logit_bias(request: GenerationFields, vocab_size: int) -> tuple[tuple[int, float], ...]:
    found = []
    for text, bias in (request.logit_bias or {}).items():
        if not text.isascii() or not text.isdigit():
            raise InvalidRequestError(f"'logit_bias' must be keyed by token ids, got {text!r}", "logit_bias")
        _check_token(int(text), vocab_size, "logit_bias")
        found.append((int(text), bias))
    return tuple(sorted(found))


def _check_token(token_id: int, vocab_size: int, param: str) -> None:
    if token_id >= vocab_size:
        raise InvalidRequestError(f"'{param}': token id {token_id} is outside the vocabulary of {vocab_size}", param)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
