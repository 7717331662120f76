"""One API request under way: its sequences, merged into one stream of deltas, and their end in every case."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from disagg.base.ids import RequestId
from disagg.base.messages import SequenceOutput
from disagg.base.request import GenerationRequest
from disagg.base.sampling import FinishReason, PositionLogprobs
from disagg.serve.api.text_stream import TextStream
from disagg.serve.router.interface import Router, SequenceStream


@dataclass(frozen=True, slots=True)
class Delta:
    """What one output added to one choice. ``prompt_logprobs`` come with a choice's first delta."""

    choice: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...]
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclass(slots=True)
class Choice:
    """One sequence to generate, and the text it becomes."""

    request: GenerationRequest
    text: TextStream
    stream: SequenceStream | None = None
    num_tokens: int = 0
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class Generation:
    """The choices of one API request. Use as an async context manager: whatever happens, nothing stays behind."""

    router: Router
    choices: Sequence[Choice]
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def __aenter__(self) -> "Generation":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.end()

    def submit(self) -> None:
        """Hand every sequence to the router. Raises OverloadedError or UnavailableError, then nothing is kept."""
        try:
            for choice in self.choices:
                choice.stream = self.router.submit(choice.request)
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """Abort what has not finished. Harmless when all has."""
        for task in self._tasks:
            task.cancel()
        for choice in self.choices:
            if choice.stream is not None and choice.finish_reason is None:
                self.router.abort(choice.request.request_id)

    async def deltas(self) -> AsyncGenerator[Delta]:
        """Yield what every choice brings, as it comes. Raises what a sequence's stream raises."""
        if len(self.choices) == 1:
            async with aclosing(self._follow(0)) as only:
                async for delta in only:
                    yield delta
            return
        queue: asyncio.Queue[Delta | BaseException | None] = asyncio.Queue()
        self._tasks = [asyncio.create_task(self._forward(index, queue)) for index in range(len(self.choices))]
        num_open = len(self._tasks)
        while num_open:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield item

    async def _forward(self, index: int, queue: "asyncio.Queue[Delta | BaseException | None]") -> None:
        try:
            async with aclosing(self._follow(index)) as deltas:
                async for delta in deltas:
                    queue.put_nowait(delta)
            queue.put_nowait(None)
        except Exception as error:  # carried to the reader, who raises it
            queue.put_nowait(error)

    async def _follow(self, index: int) -> AsyncGenerator[Delta]:
        choice = self.choices[index]
        assert choice.stream is not None, "submit first"
        async for output in choice.stream:
            delta = _advance(index, choice, output)
            yield delta
            if delta.finish_reason is not None:
                if output.finish_reason is None:
                    # A stop string ended the answer; the engine does not know it yet.
                    self.router.abort(choice.request.request_id)
                return


def _advance(index: int, choice: Choice, output: SequenceOutput) -> Delta:
    """Turn one output into what the client sees of it."""
    text, used = "", 0
    for token_id in output.token_ids:
        used += 1
        # The token that ends an answer is control, not text, unless the client asked to see it.
        is_end = output.stop_token_id is not None and used == len(output.token_ids)
        if not is_end or choice.text.include_stop_string:
            text += choice.text.push(token_id)
        if choice.text.stopped_by is not None:
            break
    choice.num_tokens += used
    reason = output.finish_reason
    if reason is not None:
        text += choice.text.finish()
    stop_reason: str | int | None = choice.text.stopped_by
    if stop_reason is not None:
        reason = FinishReason.STOP
    elif output.stop_token_id in choice.request.sampling.stop_token_ids:
        stop_reason = output.stop_token_id
    choice.finish_reason = reason
    return Delta(
        choice=index,
        text=text,
        token_ids=output.token_ids[:used],
        logprobs=output.logprobs[:used],
        prompt_logprobs=output.prompt_logprobs,
        num_cached_tokens=output.num_cached_tokens,
        finish_reason=reason,
        stop_reason=stop_reason,
    )


def request_id_of(parent: str, choice: int) -> RequestId:
    """Return the internal id of one choice."""
    return RequestId(f"{parent}-{choice}")
