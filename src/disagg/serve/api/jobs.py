"""From a prepared request to a job: cut into one sequence for each choice."""

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from disagg.base.errors import InvalidRequestError
from disagg.base.ids import Epoch, RouterId, owned_by
from disagg.base.request import GenerationRequest
from disagg.base.sampling import SamplingParams
from disagg.models.tokenizer import IncrementalDecoder
from disagg.serve.api.answer import Answer
from disagg.serve.api.chat_shape import ChatShape
from disagg.serve.api.completion_shape import CompletionShape
from disagg.serve.api.preparers import Preparation
from disagg.serve.api.preparing import PreparedChat
from disagg.serve.api.prompts import Prompt
from disagg.serve.api.responses_api.shape import ResponsesShape
from disagg.serve.api.sampling import chat_length, completion_length, sampling_params, stop_strings
from disagg.serve.api.schema import ChatCompletionRequest, CompletionRequest, StreamOptions
from disagg.serve.api.served_model import ServedModel
from disagg.serve.api.shapes import Heading, Shape
from disagg.serve.api.terms import Caller, ServiceTerms
from disagg.serve.api.text_stream import StopString, TextStream


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
