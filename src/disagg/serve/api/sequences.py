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
        self._readers: list[asyncio.Task[None]] = []
        self._arrived: list[Arrival] = []
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
        self._readers = [asyncio.create_task(self._read(index, stream)) for index, stream in enumerate(self._streams)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._abort_unfinished()
        for reader in self._readers:
            reader.cancel()
        await asyncio.wait(self._readers)

    async def take(self) -> list[Arrival]:
        """Wait until something has arrived and return all of it; an empty list once every sequence has ended.

        Raises what a sequence's stream raised, after everything that came before it, and ClientDisconnectedError
        after ``cancel``.
        """
        while not self._arrived:
            if self._error is not None:
                raise self._error
            if not self._unfinished:
                return []
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        arrived, self._arrived = self._arrived, []
        return arrived

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
        self._arrived.clear()
        self._fail(ClientDisconnectedError())

    def _abort_unfinished(self) -> None:
        for index in self._unfinished:
            self._router.abort(self._requests[index].request_id)
        self._unfinished.clear()

    async def _read(self, index: int, stream: SequenceStream) -> None:
        """Collect one sequence's outputs; several that are there already are taken without a pause."""
        try:
            async for output in stream:
                self._arrived.append((index, output))
                if output.finish_reason is not None:
                    self._unfinished.discard(index)
                self._wake()
            if index in self._unfinished:
                raise InternalError(f"sequence {self._requests[index].request_id} ended without a reason")
        except Exception as error:  # carried to the request's own task, which answers it
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        if self._error is None:
            self._error = error
        else:
            logger.debug("a second error of the same request: %s", error)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
