"""What the router keeps of one sequence under way: all that it knows of it, and its tokens on their way to the API.

A record is also what a sequence is resumed from: prompt, sampling settings with their seed, and the tokens so far.
Noise is a function of (seed, position), so an instance given ``request_now()`` continues as the lost one would have.
Tokens that it had not delivered are computed again, and are the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from msgspec import structs

from disagg.base.clock import Clock
from disagg.base.errors import DisaggError
from disagg.base.ids import Epoch, InstanceId
from disagg.base.messages import SequenceOutput
from disagg.base.objectives import BEST_EFFORT
from disagg.base.request import GenerationRequest
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
        self._take_at_once: Callable[[SequenceOutput], bool] | None = None
        self.served_by = ServedBy()
        """Who brought the tokens so far."""
        self.is_best_effort = False
        """See SequenceStream."""
        self.refusal: DisaggError | None = None
        """Why the sequence was not taken, where it was not."""

    # For the router ---------------------------------------------------------------------------------------------

    def push(self, output: SequenceOutput) -> None:
        """Add an output for the reader."""
        if self._take_at_once is not None and not self._waiting and self._take_at_once(output):
            return
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

    def listen(self, on_news: Callable[[], None], take_at_once: Callable[[SequenceOutput], bool] | None = None) -> None:
        """See SequenceStream."""
        self._on_news, self._take_at_once = on_news, take_at_once

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


@dataclass(slots=True)
class SequenceRecord:
    """One sequence, what came of it so far, and where its tokens go."""

    request: GenerationRequest
    stream: LiveStream
    output_token_ids: list[int] = field(init=False)
    _hands_over: bool = False
    _is_prefilled: bool = False
    """In this attempt."""

    def __post_init__(self) -> None:
        self.output_token_ids = list(self.request.output_token_ids)

    def request_now(self) -> GenerationRequest:
        """Return the request with all tokens so far, as an instance needs it to continue."""
        if len(self.output_token_ids) == len(self.request.output_token_ids):
            return self.request
        return structs.replace(self.request, output_token_ids=tuple(self.output_token_ids))

    def start(self, *, hands_over: bool) -> None:
        """An instance is told to compute it; with ``hands_over`` up to its first token."""
        self._hands_over, self._is_prefilled = hands_over, False

    def degrade(self) -> None:
        """Give up its objectives."""
        self.request = structs.replace(self.request, objectives=BEST_EFFORT)
        self.stream.is_best_effort = True

    def resume(self, epoch: Epoch, now: float) -> None:
        """Begin a new attempt: the instance that the sequence was on is lost."""
        self.request = structs.replace(self.request, epoch=epoch)
        self.stream.timeline.pause(now)

    def accept(self, output: SequenceOutput, instance: InstanceId, now: float) -> float | None:
        """Keep the tokens that an instance brought, stamp the timeline, and pass them on.

        Returns the seconds of the pause that they end, if there was one.
        """
        self._note(instance)
        self.output_token_ids.extend(output.token_ids)
        pause_s = self.stream.timeline.add_tokens(len(output.token_ids), now, now, output.stamps)
        self.stream.push(output)
        return pause_s

    def _note(self, instance: InstanceId) -> None:
        served_by = self.stream.served_by
        decodes = self._is_prefilled or not self._hands_over
        if not self._is_prefilled:
            self._is_prefilled = True
            served_by = structs.replace(served_by, prefill=instance)
        if decodes and served_by.decode != instance:
            served_by = structs.replace(served_by, decode=instance)
        self.stream.served_by = served_by
