"""One request's life as stamps, and the stages between them. The stages add up to the end-to-end time.

The same type is filled by the live router and by the simulator, so that both can be compared stage by stage.
"""

import enum
import math
from typing import Final

import msgspec

from disagg.base.messages import StageStamps


class Stage(enum.Enum):
    """What a request waits for or does, in order. A stage that a path does not have takes no time."""

    QUEUE_PREFILL = "queue_prefill"
    """From arrival at the API to its first prefill step (dispatch and tokenising included)."""
    PREFILL = "prefill"
    """From there to the first token at the prefill (or colocated) instance."""
    HAND_OVER_CONTROL = "hand_over_control"
    """From the first token until the decode instance knows of the offer: digests, the router's choice, two messages."""
    HAND_OVER_WAIT = "hand_over_wait"
    """From there to the start of the pull: the decode instance has no room yet."""
    HAND_OVER = "hand_over"
    """The pull of the KV blocks."""
    QUEUE_DECODE = "queue_decode"
    """From the blocks' arrival to the first decode step."""
    FIRST_DECODE = "first_decode"
    """The step that brings the second token."""
    DECODE = "decode"
    """All later tokens."""
    DELIVERY = "delivery"
    """From the last token at the instance to its delivery to the API."""
    PAUSE = "pause"
    """Without an instance: from the loss of one to the next token. It is no part of the stages that it interrupts."""

    __hash__ = object.__hash__  # Enum's own is Python code, and every request looks up all of them


class RequestTimeline(msgspec.Struct, kw_only=True):
    """Stamps in seconds of one clock; NaN where the request did not (yet) pass.

    ``arrival_s`` to ``finished_s`` are in order. A colocated request has no ``offered_s`` to ``pulled_s``. A request
    that lost its instance has the stamps of the instance that brought the token.
    """

    arrival_s: float
    prefill_started_s: float = math.nan
    first_token_s: float = math.nan
    offered_s: float = math.nan
    """When the decode instance knew of the whole offer."""
    pull_started_s: float = math.nan
    pulled_s: float = math.nan
    decode_started_s: float = math.nan
    second_token_s: float = math.nan
    last_token_s: float = math.nan
    finished_s: float = math.nan
    paused_s: float = math.nan
    """Since when a request that lost its instance waits for its next token; NaN when it does not."""
    pauses_s: tuple[tuple[float, float], ...] = ()
    """Begin and end of each pause that is over."""

    def add_tokens(self, count: int, first_s: float, last_s: float, stamps: StageStamps | None = None) -> float | None:
        """Note ``count`` new tokens, that came one after the other from ``first_s`` to ``last_s``.

        ``stamps`` come with the first token that an instance brings. Returns the seconds of the pause that ends now.
        """
        if not count:
            return None
        if math.isnan(self.first_token_s):
            self.first_token_s = first_s
            if stamps is not None:
                self.prefill_started_s = _passed(stamps.scheduled_s)
                self.first_token_s = stamps.first_step_done_s or first_s
        elif math.isnan(self.second_token_s):
            self._add_second(first_s, stamps)
        self.last_token_s = last_s
        if math.isnan(self.paused_s):
            return None
        began_s, self.paused_s = self.paused_s, math.nan
        self.pauses_s = (*self.pauses_s, (began_s, first_s))
        return first_s - began_s

    def forget_after(self, num_tokens: int) -> None:
        """Forget when tokens after the first ``num_tokens`` were computed: they never arrived."""
        if num_tokens == 0:
            self.prefill_started_s = self.first_token_s = self.last_token_s = math.nan
        elif num_tokens == 1:
            self.last_token_s = self.first_token_s
        if num_tokens < 2:
            self.offered_s = self.pull_started_s = self.pulled_s = self.decode_started_s = self.second_token_s = (
                math.nan
            )

    def pause(self, now: float) -> None:
        """Note that the request lost its instance; a pause that has begun goes on."""
        if math.isnan(self.paused_s):
            self.paused_s = now

    def _add_second(self, now: float, stamps: StageStamps | None) -> None:
        if stamps is None:  # it came from the instance that brought the first token
            self.decode_started_s, self.second_token_s = self.first_token_s, now
            return
        self.offered_s = max(self.first_token_s, stamps.received_s) if stamps.received_s else math.nan
        self.pull_started_s = _passed(stamps.pull_started_s)
        self.pulled_s = _passed(stamps.pulled_s)
        self.decode_started_s = _passed(stamps.scheduled_s)
        self.second_token_s = stamps.first_step_done_s or now

    def stages(self) -> dict[Stage, float]:
        """Return the seconds of each stage. A missing stamp takes the one before it, so the sum stays exact."""
        stamps = (
            self.prefill_started_s,
            self.first_token_s,
            self.offered_s,
            self.pull_started_s,
            self.pulled_s,
            self.decode_started_s,
            self.second_token_s,
            self.last_token_s,
            self.finished_s,
        )
        stages: dict[Stage, float] = {}
        before, paused_s = self.arrival_s, 0.0
        for stage, stamp in zip(_PASSED_IN_ORDER, stamps, strict=True):
            after = before if math.isnan(stamp) else stamp
            stages[stage] = after - before
            if self.pauses_s:
                within_s = sum(max(0.0, min(end, after) - max(begin, before)) for begin, end in self.pauses_s)
                stages[stage] -= within_s
                paused_s += within_s
            before = after
        stages[Stage.PAUSE] = paused_s
        return stages


_PASSED_IN_ORDER: Final = tuple(stage for stage in Stage if stage is not Stage.PAUSE)


def _passed(stamp_s: float) -> float:
    """Return the stamp, or NaN for a stage that was not passed."""
    return stamp_s or math.nan
