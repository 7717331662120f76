"""The generating endpoints: run a job's sequences and send what becomes of them, whole or as a stream."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Final

from msgspec import UNSET
from starlette.types import Receive, Scope, Send

from disagg.base.errors import DisaggError, InternalError, UnavailableError
from disagg.base.messages import SequenceOutput
from disagg.base.request import GenerationRequest
from disagg.base.service_classes import Overload
from disagg.serve.api.answer import Delta
from disagg.serve.api.disconnect import ClientDisconnectedError, noticing_disconnect
from disagg.serve.api.failures import as_disagg_error
from disagg.serve.api.http import DirectWriter, EventStream, RawHeaders, direct_writer, read_body, send_json
from disagg.serve.api.jobs import Job
from disagg.serve.api.observer import Accounts, RequestObserver
from disagg.serve.api.responses import PromptTokensDetails, Usage, encode
from disagg.serve.api.shapes import ShownUsage
from disagg.serve.api.terms import Caller, caller_of
from disagg.serve.router.interface import Router, SequenceStream

if TYPE_CHECKING:  # its library is an extra
    from disagg.serve.api.tracing import RequestTrace

logger = logging.getLogger(__name__)

MakeJob = Callable[[bytes, float, int, Caller], Awaitable[Job]]
"""From a body, its arrival, the longest sequence, in tokens, that the instances take, and who asks."""

Arrival = tuple[int, SequenceOutput]
"""An output, and the index of its sequence."""

SERVICE_HEADER: Final = "x-slo-service"
"""Of the response to a request that is served as best effort."""
_BEST_EFFORT: Final[RawHeaders] = ((SERVICE_HEADER.encode(), Overload.BEST_EFFORT.value.encode()),)

MANY_LOGPROBS: Final = 5_000
"""Answers with more probabilities at once are written in a thread: these take some 10 ms."""


class GenerationEndpoint:
    """ASGI endpoint that answers one kind of generating request."""

    def __init__(self, make_job: MakeJob, router: Router, accounts: Accounts) -> None:
        self._make_job = make_job
        self._router = router
        self._accounts = accounts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. What goes wrong before the first output is raised, to become a proper status."""
        if self._accounts.traces is None:
            await self._serve(scope, receive, send)
            return
        trace = self._accounts.traces.begin(scope)
        try:
            await self._serve(scope, receive, trace.announced(send), trace)
        except Exception as error:
            trace.failed(error)
            raise
        finally:
            trace.end()

    async def _serve(self, scope: Scope, receive: Receive, send: Send, trace: "RequestTrace | None" = None) -> None:
        arrival_s = self._accounts.clock.now()
        request_id = scope["state"]["request_id"]
        try:
            job = await self._read_job(receive, arrival_s, caller_of(scope))
            with RequestObserver(self._accounts, job, request_id, arrival_s, trace) as observer:
                await self._answer(job, observer, receive, send, direct_writer(scope))
        except ClientDisconnectedError:
            logger.debug("%s %s: the client went away", request_id, scope["path"])

    async def _read_job(self, receive: Receive, arrival_s: float, caller: Caller) -> Job:
        await self._router.wait_started()  # before the body is read, so that it takes no memory meanwhile
        body = await read_body(receive)
        return await self._make_job(body, arrival_s, longest_sequence(self._router), caller)

    async def _answer(
        self, job: Job, observer: RequestObserver, receive: Receive, send: Send, writer: DirectWriter | None
    ) -> None:
        requests = [answer.request for answer in job.answers]
        async with (
            RunningSequences(self._router, requests) as running,
            noticing_disconnect(receive, running.cancel),
        ):
            observer.submitted(running.streams)
            run = Run(job, running, observer)
            headers = _BEST_EFFORT if any(stream.is_best_effort for stream in running.streams) else ()
            if job.stream_options is None:
                await send_json(send, await run.whole(), headers)
            else:
                async with EventStream(send, headers) as events:
                    await run.stream(events, writer)


class RunningSequences:
    """Sequences under way, from ``async with`` to its end, which aborts every one that has not finished.

    Entering raises OverloadedError or UnavailableError when the router refuses one of them: then none is kept.
    """

    def __init__(self, router: Router, requests: Sequence[GenerationRequest]) -> None:
        self._router = router
        self._requests = requests
        self._unfinished: set[int] = set()
        self._streams: list[SequenceStream] = []
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._may_have_news = True
        self._read_at_once: Callable[[SequenceOutput], bool] | None = None

    async def __aenter__(self) -> "RunningSequences":
        try:
            for index, request in enumerate(self._requests):
                self._streams.append(self._router.submit(request))
                self._unfinished.add(index)
        except DisaggError:
            self._abort_unfinished()
            raise
        for stream in self._streams:
            stream.listen(self._wake, self._take_at_once)
        return self

    def read_at_once(self, read: Callable[[SequenceOutput], bool]) -> None:
        """Offer the only sequence's outputs to ``read`` as they come, while ``take`` waits: it says if it took them."""
        self._read_at_once = read if len(self._streams) == 1 else None

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._abort_unfinished()

    async def take(self) -> list[Arrival]:
        """Wait until something has arrived and return all of it; an empty list once every sequence has ended.

        Raises what a sequence's stream raised, after everything that came before it, and ClientDisconnectedError
        after ``cancel``.
        """
        while self._error is None and self._unfinished:
            if self._may_have_news and (arrived := self._collect()):
                return arrived
            if self._error is None:
                self._waiter = asyncio.get_running_loop().create_future()
                await self._waiter
        if self._error is not None:
            raise self._error
        return []

    @property
    def streams(self) -> Sequence[SequenceStream]:
        """The sequences' streams, for their timelines: the outputs are read here."""
        return self._streams

    def stop(self, index: int) -> None:
        """End one sequence whose answer is complete, though the engine may not know it: a stop string was met."""
        if index in self._unfinished:
            self._unfinished.discard(index)
            self._router.abort(self._requests[index].request_id)

    def cancel(self) -> None:
        """The client has gone: let ``take`` say so, and give no more outputs."""
        self._fail(ClientDisconnectedError())
        self._wake()

    def _abort_unfinished(self) -> None:
        for index in self._unfinished:
            self._router.abort(self._requests[index].request_id)
        self._unfinished.clear()

    def _collect(self) -> list[Arrival]:
        """Return what the unfinished sequences have brought, sequence by sequence."""
        self._may_have_news = False
        arrived: list[Arrival] = []
        for index in tuple(self._unfinished):
            stream = self._streams[index]
            try:
                outputs = stream.take()
                arrived += [(index, output) for output in outputs]
                if outputs and outputs[-1].finish_reason is not None:
                    self._unfinished.discard(index)
                elif stream.is_ended and not outputs:
                    raise InternalError(f"sequence {self._requests[index].request_id} ended without a reason")
                elif stream.is_ended:
                    self._may_have_news = True  # its error, which comes after what was taken
            except Exception as error:  # kept until everything that came before it was given out
                self._fail(error)
        return arrived

    def _take_at_once(self, output: SequenceOutput) -> bool:
        if self._read_at_once is None or self._waiter is None or self._waiter.done():
            return False
        try:
            return self._read_at_once(output)
        except Exception as error:  # it is no fault of the router, which calls this
            self._fail(error)
            self._wake()
            return True

    def _fail(self, error: Exception) -> None:
        if self._error is None:
            self._error = error
        else:
            logger.debug("a second error of the same request: %s", error)

    def _wake(self) -> None:
        self._may_have_news = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Run:
    """One job under way."""

    def __init__(self, job: Job, running: RunningSequences, observer: RequestObserver) -> None:
        self._job = job
        self._running = running
        self._observer = observer
        self._num_completion = 0
        self._num_cached = 0

    async def whole(self) -> bytes:
        """Return the whole answer as JSON. Raises what a sequence met."""
        parts: list[list[Delta]] = [[] for _ in self._job.answers]
        while arrivals := await self._running.take():
            for delta in self._deltas(arrivals):
                parts[delta.choice].append(delta)
        usage = self._usage()
        num_logprobs = sum(delta.num_logprobs for deltas in parts for delta in deltas)
        return await _written(num_logprobs, lambda: encode(self._job.shape.whole(parts, usage)))

    async def stream(self, events: EventStream, writer: DirectWriter | None = None) -> None:
        """Send deltas as they come, all that have arrived in one write; most go to ``writer`` if there is one.

        Before the first write, raises what a sequence met; later that becomes an event, since the status is sent.
        """
        options = self._job.stream_options
        if writer is not None and not (options is not None and options.continuous_usage_stats):
            self._running.read_at_once(partial(self._write_at_once, writer, self._shown_usage()))
        try:
            while arrivals := await self._running.take():
                deltas = [(delta, self._shown_usage()) for delta in self._deltas(arrivals)]
                if written := await self._events(deltas, is_first=not events.started):
                    await events.write(written)
            await events.write(self._job.shape.ending(self._usage()))
        except ClientDisconnectedError:
            raise
        except Exception as error:
            if not events.started:
                raise
            failure = as_disagg_error(error)
            self._observer.failed_in_stream(failure)
            await events.write(self._job.shape.failure(failure))
        await events.end()

    def _write_at_once(self, writer: DirectWriter, usage: ShownUsage, output: SequenceOutput) -> bool:
        """Send an output's event if that needs no more than a look at it; return whether it was taken.

        So nearly all tokens go from the instance's message to the client's socket without a task in between.
        """
        delta = self._job.answers[0].accept_plain(output) if writer.is_ready() else None
        if delta is None:
            return False
        if self._job.counts_answer:
            self._num_completion += 1
        self._observer.see(delta)
        if event := self._job.shape.chunk(delta, usage):
            writer.write(event)
        return True

    async def _events(self, deltas: Sequence[tuple[Delta, ShownUsage]], *, is_first: bool) -> bytes:
        """Return the events of deltas, after those that a stream begins with; none where there is nothing to show."""
        chunk = self._job.shape.chunk
        num_logprobs = 0
        for delta, _ in deltas:
            num_logprobs += delta.num_logprobs
        if num_logprobs > MANY_LOGPROBS:
            chunks = await asyncio.to_thread(lambda: b"".join([chunk(delta, usage) for delta, usage in deltas]))
        elif len(deltas) == 1:  # most writes are one token's
            chunks = chunk(*deltas[0])
        else:
            chunks = b"".join([chunk(delta, usage) for delta, usage in deltas])
        return self._job.shape.openings(self._shown_usage()) + chunks if is_first and chunks else chunks

    def _deltas(self, arrivals: Iterable[Arrival]) -> Iterator[Delta]:
        """Turn outputs into deltas, count them, and end the sequences whose answers are complete."""
        for index, output in arrivals:
            answer = self._job.answers[index]
            if answer.finish_reason is not None:
                continue  # the answer was cut by a stop string before this came
            delta = answer.accept(output)
            if self._job.counts_answer:
                self._num_completion += len(delta.token_ids)
            if index % self._job.num_choices == 0:
                self._num_cached += delta.num_cached_tokens
            self._observer.see(delta)
            if delta.finish_reason is not None:
                self._running.stop(index)
                self._observer.finished(index, delta.finish_reason, answer)
            yield delta

    def _usage(self) -> Usage:
        num_prompt = self._job.num_prompt_tokens
        details = PromptTokensDetails(self._num_cached)
        return Usage(num_prompt, num_prompt + self._num_completion, self._num_completion, details)

    def _shown_usage(self) -> ShownUsage:
        options = self._job.stream_options
        assert options is not None, "a job that is not streamed"
        if options.continuous_usage_stats:
            return self._usage()
        return None if options.include_usage else UNSET


async def _written(num_logprobs: int, write: Callable[[], bytes]) -> bytes:
    """Return what ``write`` returns, aside from the event loop where that takes long."""
    return write() if num_logprobs <= MANY_LOGPROBS else await asyncio.to_thread(write)


def longest_sequence(router: Router) -> int:
    """Return how many tokens every instance takes, prompt and answer. Raises UnavailableError when none has said."""
    limits = [status.facts.max_model_len for status in router.instances() if status.facts is not None]
    if not limits:
        raise UnavailableError("no instance is ready yet: try again in a few seconds, or watch /ready")
    return min(limits)
