"""The generating endpoints: from a body to sequences, from their deltas to an answer or a stream."""

import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

from disagg.base.block_hash import hash_blocks
from disagg.base.clock import Clock
from disagg.base.errors import DisaggError, ModelNotFoundError, UnavailableError
from disagg.base.ids import Epoch
from disagg.base.request import GenerationRequest
from disagg.base.sampling import SamplingParams
from disagg.models.tokenizer import IncrementalDecoder
from disagg.serve.api.decoding import decode_body
from disagg.serve.api.generation import Choice, Delta, Generation, request_id_of
from disagg.serve.api.http import EventStream, error_event, json_response, read_body, until_disconnected
from disagg.serve.api.metrics import RequestObserver, ServerMetrics
from disagg.serve.api.prompts import chat_prompt, completion_prompts
from disagg.serve.api.responses import DONE, PromptTokensDetails, Usage, event
from disagg.serve.api.sampling import answer_length, sampling_params, stop_strings
from disagg.serve.api.schema import ChatCompletionRequest, CompletionRequest, StreamOptions
from disagg.serve.api.served_model import ServedModel
from disagg.serve.api.shapes import ChatShape, CompletionShape, Shape
from disagg.serve.api.text_stream import TextStream
from disagg.serve.router.interface import Router

logger = logging.getLogger(__name__)

DEFAULT_COMPLETION_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Job:
    """A checked request: its sequences and the shape of its answer."""

    request: CompletionRequest | ChatCompletionRequest
    response_id: str
    choices: Sequence[Choice]
    shape: Shape
    num_prompt_tokens: int


class Endpoints:
    """Handlers of ``/v1/completions`` and ``/v1/chat/completions``."""

    def __init__(self, router: Router, model: ServedModel, metrics: ServerMetrics, clock: Clock) -> None:
        self._router = router
        self._model = model
        self._metrics = metrics
        self._clock = clock

    async def completions(self, request: Request) -> Response:
        """Complete one or several prompts."""
        arrival_s = self._clock.now()
        body = decode_body(await read_body(request), CompletionRequest)
        self.check_model(body.model)
        return await self._answer(request, self._completion_job(body, arrival_s), arrival_s)

    async def chat_completions(self, request: Request) -> Response:
        """Answer a chat."""
        arrival_s = self._clock.now()
        body = decode_body(await read_body(request), ChatCompletionRequest)
        self.check_model(body.model)
        return await self._answer(request, self._chat_job(body, arrival_s), arrival_s)

    def check_model(self, name: str | None) -> None:
        """Raise ModelNotFoundError for a name that is not served; no name means the model that is."""
        if name is not None and name != self._model.name:
            raise ModelNotFoundError(f"the model '{name}' is not served here, only '{self._model.name}'")

    def max_model_len(self) -> int:
        """Return the longest sequence that every live instance takes. Raises UnavailableError when none is live."""
        limits = [status.facts.max_model_len for status in self._router.instances() if status.facts is not None]
        if not limits:
            raise UnavailableError("no instance is ready yet: try again in a few seconds, or watch /ready")
        return min(limits)

    def _completion_job(self, body: CompletionRequest, arrival_s: float) -> Job:
        prompts = completion_prompts(body, self._model)
        default = 0 if body.echo and body.max_tokens == 0 else DEFAULT_COMPLETION_TOKENS
        response_id = f"cmpl-{uuid.uuid4().hex}"
        choices: list[Choice] = []
        for prompt in prompts:
            length = answer_length(len(prompt), body.max_tokens, default, self.max_model_len())
            params = sampling_params(body, length, self._model.vocab_size)
            choices += self._choices(body, prompt, params, response_id, len(choices), arrival_s)
        of_choice = [prompt for prompt in prompts for _ in range(body.n or 1)]
        shape = CompletionShape(body, response_id, int(time.time()), self._model, of_choice)
        return Job(body, response_id, choices, shape, sum(map(len, prompts)))

    def _chat_job(self, body: ChatCompletionRequest, arrival_s: float) -> Job:
        prompt = chat_prompt(body, self._model)
        asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        length = answer_length(len(prompt), asked, None, self.max_model_len())
        params = sampling_params(body, length, self._model.vocab_size)
        response_id = f"chatcmpl-{uuid.uuid4().hex}"
        choices = self._choices(body, prompt, params, response_id, 0, arrival_s)
        shape = ChatShape(body, response_id, int(time.time()), self._model)
        return Job(body, response_id, choices, shape, len(prompt))

    def _choices(
        self,
        body: CompletionRequest | ChatCompletionRequest,
        prompt: Sequence[int],
        params: Sequence[SamplingParams],
        response_id: str,
        first: int,
        arrival_s: float,
    ) -> list[Choice]:
        stops, tokens = stop_strings(body), tuple(prompt)
        hashes = hash_blocks(tokens, self._model.block_size)
        return [
            Choice(
                request=GenerationRequest(
                    request_id=request_id_of(response_id, first + index),
                    epoch=Epoch(0),
                    prompt_token_ids=tokens,
                    sampling=one,
                    eos_token_ids=self._model.eos_token_ids,
                    block_hashes=hashes,
                    priority=body.priority,
                    arrival_s=arrival_s,
                ),
                text=TextStream(
                    IncrementalDecoder(self._model.tokenizer, tokens, body.skip_special_tokens),
                    stops,
                    include_stop_string=body.include_stop_str_in_output,
                    min_tokens=one.min_tokens,
                ),
            )
            for index, one in enumerate(params)
        ]

    async def _answer(self, request: Request, job: Job, arrival_s: float) -> Response:
        observer = RequestObserver(self._metrics, self._clock, job.response_id, job.num_prompt_tokens, arrival_s)
        deltas = self._deltas(job, observer)
        headers = _echoed(request)
        if not job.request.stream:
            async with aclosing(deltas):
                return json_response(await until_disconnected(request, _whole(job, deltas)), headers=headers)
        # No status is sent before the first token is there: what goes wrong until then is a proper error.
        first = await until_disconnected(request, anext(deltas))
        return EventStream(_stream(job, first, deltas), headers, source=deltas)

    async def _deltas(self, job: Job, observer: RequestObserver) -> AsyncGenerator[Delta]:
        """Submit the sequences and pass their deltas on. However it ends, nothing stays in the router."""
        async with Generation(self._router, job.choices) as generation:
            try:
                generation.submit()
                async with aclosing(generation.deltas()) as deltas:
                    async for delta in deltas:
                        observer.see(delta)
                        yield delta
            finally:
                observer.end(job.choices)


class UsageCounter:
    """Counts one request's tokens as they come."""

    def __init__(self, job: Job) -> None:
        self._num_prompt = job.num_prompt_tokens
        # With max_tokens 0 a prompt alone is asked about; the one token sampled after it is not the client's.
        self._counts_answer = job.request.max_tokens != 0
        self._num_completion = 0
        self._num_cached = 0

    def see(self, delta: Delta) -> None:
        """Count one delta."""
        self._num_completion += len(delta.token_ids) * self._counts_answer
        self._num_cached = max(self._num_cached, delta.num_cached_tokens)

    @property
    def usage(self) -> Usage:
        """The count so far."""
        return Usage(
            prompt_tokens=self._num_prompt,
            completion_tokens=self._num_completion,
            total_tokens=self._num_prompt + self._num_completion,
            prompt_tokens_details=PromptTokensDetails(self._num_cached),
        )


async def _whole(job: Job, deltas: AsyncIterator[Delta]) -> object:
    """Collect an answer."""
    counter = UsageCounter(job)
    parts: list[list[Delta]] = [[] for _ in job.choices]
    async for delta in deltas:
        counter.see(delta)
        parts[delta.choice].append(delta)
    return job.shape.whole(parts, counter.usage)


async def _stream(job: Job, first: Delta, rest: AsyncIterator[Delta]) -> AsyncGenerator[bytes]:
    """Turn deltas into events. An error after the first token becomes an event, since the status is sent."""
    options = job.request.stream_options or StreamOptions()
    counter = UsageCounter(job)
    for index in range(len(job.choices)):
        opening = job.shape.opening(index, counter.usage if options.continuous_usage_stats else None)
        if opening is not None:
            yield event(opening)
    try:
        delta: Delta | None = first
        while delta is not None:
            counter.see(delta)
            yield event(job.shape.chunk(delta, counter.usage if options.continuous_usage_stats else None))
            delta = await anext(rest, None)
    except DisaggError as error:
        logger.warning("%s failed in its stream: %s", job.response_id, error)
        yield error_event(error)
        return
    if options.include_usage:
        yield event(job.shape.closing(counter.usage))
    yield DONE


def _echoed(request: Request) -> dict[str, str]:
    """Return the client's own request id, which is never a key here."""
    given = request.headers.get("x-request-id")
    return {"X-Request-Id": given} if given is not None and len(given) <= 256 and given.isprintable() else {}
