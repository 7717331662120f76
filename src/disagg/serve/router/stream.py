"""The tokens of one sequence on their way from the router to the API."""

from collections.abc import Callable, Sequence

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
        self._waiting: list[SequenceOutput] = []
        self._is_over = False
        self._error: DisaggError | None = None
        self._on_news: Callable[[], None] | None = None
        self.served_by = ServedBy()
        """Who brought the tokens so far."""
        self.refusal: DisaggError | None = None
        """Why the sequence was not taken, where it was not."""

    # For the router ---------------------------------------------------------------------------------------------

    def push(self, output: SequenceOutput) -> None:
        """Add an output for the reader."""
        self._waiting.append(output)
        self._tell()

    def end(self, error: DisaggError | None = None) -> None:
        """Let the stream end after what was pushed before, with ``error`` if there is one. The first call counts."""
        if self._is_over:
            return
        self._is_over = True
        self._error = error
        self._tell()

    def refuse(self, error: DisaggError) -> None:
        """Note that the sequence was not taken."""
        self.refusal = error
        self.end(error)

    # For the reader ---------------------------------------------------------------------------------------------

    def listen(self, on_news: Callable[[], None]) -> None:
        """See SequenceStream."""
        self._on_news = on_news

    def take(self) -> Sequence[SequenceOutput]:
        """See SequenceStream."""
        outputs = self._waiting
        if outputs:
            self._waiting = []
            if outputs[-1].finish_reason is not None:
                self._stamp_end()
            return outputs
        if self._is_over:
            self._stamp_end()
            if self._error is not None:
                raise self._error
        return ()

    @property
    def is_ended(self) -> bool:
        """See SequenceStream."""
        return self._is_over and not self._waiting

    @property
    def timeline(self) -> RequestTimeline:
        """See SequenceStream."""
        return self._timeline

    def _stamp_end(self) -> None:
        if not self._timeline.finished_s <= self._clock.now():  # NaN until stamped
            self._timeline.finished_s = self._clock.now()

    def _tell(self) -> None:
        if self._on_news is not None:
            self._on_news()
