"""The sequences of one API request: submitted together, read together, and aborted together however it ends."""

import asyncio
import logging
from collections.abc import Sequence
from types import TracebackType

from disagg.base.errors import DisaggError, InternalError
from disagg.base.messages import SequenceOutput
from disagg.base.request import GenerationRequest
from disagg.serve.api.disconnect import ClientDisconnectedError
from disagg.serve.router.interface import Router, SequenceStream

logger = logging.getLogger(__name__)

Arrival = tuple[int, SequenceOutput]
"""An output, and the index of its sequence."""


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

    async def __aenter__(self) -> "RunningSequences":
        try:
            for index, request in enumerate(self._requests):
                self._streams.append(self._router.submit(request))
                self._unfinished.add(index)
        except DisaggError:
            self._abort_unfinished()
            raise
        for stream in self._streams:
            stream.listen(self._wake)
        return self

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
            if arrived := self._collect():
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
            except Exception as error:  # kept until everything that came before it was given out
                self._fail(error)
        return arrived

    def _fail(self, error: Exception) -> None:
        if self._error is None:
            self._error = error
        else:
            logger.debug("a second error of the same request: %s", error)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
