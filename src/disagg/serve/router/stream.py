"""The tokens of one sequence on their way from the router to the API."""

import asyncio
from collections import deque

from disagg.base.clock import Clock
from disagg.base.errors import DisaggError
from disagg.base.messages import SequenceOutput
from disagg.measure.timeline import RequestTimeline
from disagg.serve.router.interface import ServedBy


class LiveStream:
    """A SequenceStream for one reader. It holds at most the sequence's ``max_tokens`` tokens."""

    def __init__(self, timeline: RequestTimeline, clock: Clock) -> None:
        self._timeline = timeline
        self._clock = clock
        self._waiting: deque[SequenceOutput] = deque()
        self._ended = False
        self._error: DisaggError | None = None
        self._reader: asyncio.Future[None] | None = None
        self.served_by = ServedBy()
        """Who brought the tokens so far."""
        self.refusal: DisaggError | None = None
        """Why the sequence was not taken, where it was not."""

    @property
    def timeline(self) -> RequestTimeline:
        """Stage stamps so far; complete once the iteration ended."""
        return self._timeline

    def push(self, output: SequenceOutput) -> None:
        """Add an output for the reader."""
        self._waiting.append(output)
        self._wake()

    def end(self, error: DisaggError | None = None) -> None:
        """Let the iteration end after what was pushed before, with ``error`` if there is one. The first call counts."""
        if self._ended:
            return
        self._ended = True
        self._error = error
        self._wake()

    def refuse(self, error: DisaggError) -> None:
        """Note that the sequence was not taken."""
        self.refusal = error
        self.end(error)

    def __aiter__(self) -> "LiveStream":
        return self

    async def __anext__(self) -> SequenceOutput:
        while not self._waiting:
            if self._ended:
                self._stamp_end()
                if self._error is not None:
                    raise self._error
                raise StopAsyncIteration
            assert self._reader is None, "a stream has one reader"
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        output = self._waiting.popleft()
        if output.finish_reason is not None:
            self._stamp_end()
        return output

    def _stamp_end(self) -> None:
        if not self._timeline.finished_s <= self._clock.now():  # NaN until stamped
            self._timeline.finished_s = self._clock.now()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
