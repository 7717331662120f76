"""From a prepared request to a job: cut into one sequence for each choice, whose sampling parameters are complete."""

import secrets
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from disagg.base.errors import ConfigurationError, ContextLengthError, InvalidRequestError
from disagg.base.ids import Epoch, RouterId, owned_by
from disagg.base.request import GenerationRequest
from disagg.base.sampling import SamplingParams
from disagg.models.generation_config import GenerationDefaults
from disagg.models.tokenizer import IncrementalDecoder
from disagg.serve.api.answer import Answer, StopString, TextStream
from disagg.serve.api.chat_shape import ChatShape
from disagg.serve.api.completion_shape import CompletionShape
from disagg.serve.api.preparers import Preparation
from disagg.serve.api.preparing import PreparedChat, TokenConstraints
from disagg.serve.api.prompts import LENGTH_LIMIT, Prompt, check_fits
from disagg.serve.api.responses_api.shape import ResponsesShape
from disagg.serve.api.schema import ChatCompletionRequest, CompletionRequest, GenerationFields, StreamOptions
from disagg.serve.api.served_model import ServedModel
from disagg.serve.api.shapes import Heading, Shape
from disagg.serve.api.terms import Caller, ServiceTerms

DEFAULT_COMPLETION_TOKENS: Final = 16
_SEED_BITS: Final = 64
_MAX_ID_DIGITS: Final = 20
_NO_DEFAULTS: Final = GenerationDefaults()
_NO_CONSTRAINTS: Final = TokenConstraints()


@dataclass(frozen=True, slots=True)
class Job:
    """A checked request. Choice i is for prompt ``i // num_choices``.

    ``stream_options`` is None where the answer is wanted whole. ``counts_answer`` is false when the prompt alone was
    asked about: the one token sampled after it is not the client's.
    """

    response_id: str
    answers: Sequence[Answer]
    shape: Shape
    num_prompt_tokens: int
    num_choices: int
    stream_options: StreamOptions | None
    counts_answer: bool = True


class JobFactory:
    """Makes jobs for one model."""

    def __init__(self, model: ServedModel, preparation: Preparation, router: RouterId, terms: ServiceTerms) -> None:
        self._model = model
        self._terms = terms
        self._router = router
        self._preparation = preparation

    async def completion(self, body: bytes, arrival_s: float, max_model_len: int, caller: Caller) -> Job:
        """Make the job of a ``/v1/completions`` body. Raises InvalidRequestError and ModelNotFoundError."""
        prepared = await self._preparation.completion(body, max_model_len)
        request, prompts = prepared.request, prepared.prompts
        response_id = f"cmpl-{uuid.uuid4().hex}"
        stops = _stops(request)
        answers: list[Answer] = []
        for prompt in prompts:
            length = completion_length(request, len(prompt.token_ids), max_model_len, self._model.defaults)
            params = sampling_params(
                request, length, self._model.vocab_size, self._model.defaults, constraints=prepared.constraints
            )
            answers += self._answers(request, prompt, params, stops, response_id, len(answers), arrival_s, caller)
        of_choice = [prompt for prompt in prompts for _ in range(request.n or 1)]
        return Job(
            response_id=response_id,
            answers=answers,
            shape=CompletionShape(request, self._heading(response_id), self._model.tokenizer, of_choice),
            num_prompt_tokens=sum(len(prompt.token_ids) for prompt in prompts),
            num_choices=request.n or 1,
            stream_options=_stream_options(request),
            counts_answer=request.most_tokens != 0,
        )

    async def chat(self, body: bytes, arrival_s: float, max_model_len: int, caller: Caller) -> Job:
        """Make the job of a ``/v1/chat/completions`` body. Raises as ``completion`` does."""
        prepared = await self._preparation.chat(body, max_model_len)
        response_id = f"chatcmpl-{uuid.uuid4().hex}"
        heading, tokenizer = self._heading(response_id), self._model.tokenizer

        def shape(_: SamplingParams) -> Shape:
            return ChatShape(prepared.request, heading, tokenizer, prepared.prompt, prepared.reading)

        return self._chat_job(prepared, response_id, shape, arrival_s, max_model_len, caller)

    async def response(self, body: bytes, arrival_s: float, max_model_len: int, caller: Caller) -> Job:
        """Make the job of a ``/v1/responses`` body. Raises as ``completion`` does."""
        prepared = await self._preparation.response(body, max_model_len)
        response_id = f"resp_{uuid.uuid4().hex}"
        heading = self._heading(response_id)

        def shape(sampling: SamplingParams) -> Shape:
            return ResponsesShape(prepared.request, heading, prepared.chat.reading, sampling)

        return self._chat_job(prepared.chat, response_id, shape, arrival_s, max_model_len, caller)

    def _chat_job(
        self,
        prepared: PreparedChat,
        response_id: str,
        shape: Callable[[SamplingParams], Shape],
        arrival_s: float,
        max_model_len: int,
        caller: Caller,
    ) -> Job:
        request, prompt, model = prepared.request, prepared.prompt, self._model
        length = chat_length(request, len(prompt.token_ids), max_model_len, model.defaults)
        params = sampling_params(request, length, model.vocab_size, model.defaults, constraints=prepared.constraints)
        marks = prepared.reading.marks(model.tokenizer)
        return Job(
            response_id=response_id,
            answers=self._answers(request, prompt, params, _stops(request), response_id, 0, arrival_s, caller, marks),
            shape=shape(params[0]),
            num_prompt_tokens=len(prompt.token_ids),
            num_choices=request.n or 1,
            stream_options=_stream_options(request),
        )

    def _answers(
        self,
        request: CompletionRequest | ChatCompletionRequest,
        prompt: Prompt,
        params: Sequence[SamplingParams],
        stops: Sequence[StopString],
        response_id: str,
        first: int,
        arrival_s: float,
        caller: Caller,
        marks: frozenset[int] = frozenset(),
    ) -> list[Answer]:
        """Return the choices of one prompt, numbered from ``first``.

        ``marks``: control tokens that are text all the same.
        """
        own = self._terms.of(request, caller)
        return [
            Answer(
                index,
                GenerationRequest(
                    request_id=owned_by(self._router, f"{response_id}-{index}"),
                    epoch=Epoch(0),
                    prompt_token_ids=prompt.token_ids,
                    sampling=sampling,
                    eos_token_ids=self._model.eos_token_ids,
                    block_hashes=prompt.block_hashes,
                    hash_block_size=self._model.hash_block_size,
                    cache_salt=request.cache_salt or "",
                    priority=own.priority,
                    tenant=own.tenant,
                    service_class=own.service_class,
                    objectives=own.objectives,
                    arrival_s=arrival_s,
                ),
                TextStream(
                    IncrementalDecoder(
                        self._model.tokenizer, prompt.token_ids, request.skip_special_tokens is not False, marks
                    ),
                    stops,
                    include_stop_string=bool(request.include_stop_str_in_output),
                    min_tokens=sampling.min_tokens,
                ),
            )
            for index, sampling in enumerate(params, start=first)
        ]

    def _heading(self, response_id: str) -> Heading:
        return Heading(response_id, int(time.time()), self._model.name)


def _stops(request: CompletionRequest | ChatCompletionRequest) -> list[StopString]:
    return [StopString(text) for text in stop_strings(request)]


def _stream_options(request: CompletionRequest | ChatCompletionRequest) -> StreamOptions | None:
    if request.stream:
        return request.stream_options or StreamOptions()
    if request.stream_options is not None:
        raise InvalidRequestError("'stream_options' needs 'stream': true", "stream_options")
    return None


# Sampling parameters ----------------------------------------------------------------------------------------------


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


def _fitting(num_prompt_tokens: int, asked: int | None, default: int, limit: int) -> int:
    """Check a length that was asked for; cut the default one to what is left."""
    check_fits(num_prompt_tokens, limit)
    room = limit - num_prompt_tokens
    if asked is not None and asked > room:
        raise ContextLengthError(
            f"{LENGTH_LIMIT.format(limit)}, but the prompt has {num_prompt_tokens} tokens and {asked} more were asked "
            f"for: ask for at most {room}",
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
