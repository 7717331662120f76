"""What was asked of a deployment lately, and what came of it: the ground of autoscaling and re-planning. Pure."""

from collections import deque
from collections.abc import Sequence
from typing import Final

import msgspec

from disagg.base.request import Role
from disagg.scheduling.dispatch.state import InstanceEntry, SequenceEntry

RECENT_S: Final = 30.0
"""Arrivals and starts that count as recent."""
_MOST_ARRIVALS: Final = 20_000
_MOST_ENDED: Final = 4096


class Arrival(msgspec.Struct, frozen=True, array_like=True):
    """When a sequence arrived, and the tokens of its prompt."""

    time_s: float
    num_prompt_tokens: int


class Started(msgspec.Struct, frozen=True, array_like=True):
    """When and on what kind of instance a sequence began; of its prompt, what was computed."""

    time_s: float
    role: Role
    num_prompt_tokens: int
    num_computed_tokens: int


class EndedSequence(msgspec.Struct, frozen=True, array_like=True):
    """A sequence that came to its end; of its prompt, so many tokens were computed."""

    arrival_s: float
    num_computed_tokens: int
    num_prompt_tokens: int
    num_answer_tokens: int


class WorkloadWindow:
    """The sequences of the last ``RECENT_S`` seconds, and the last few thousand that ended."""

    def __init__(self) -> None:
        self._arrivals: deque[Arrival] = deque(maxlen=_MOST_ARRIVALS)
        self._started: deque[Started] = deque(maxlen=_MOST_ARRIVALS)
        self._ended: deque[EndedSequence] = deque(maxlen=_MOST_ENDED)
        self._since_s: float | None = None
        self.num_ended = 0
        """Since the beginning."""

    def arrived(self, num_prompt_tokens: int, now: float) -> None:
        """Note an arrival, also of what is refused."""
        if self._since_s is None:
            self._since_s = now
        self._arrivals.append(Arrival(now, num_prompt_tokens))
        self._forget(now)

    def started(self, sequence: SequenceEntry, instance: InstanceEntry, now: float) -> None:
        """Note that an instance begins a sequence; one that is resumed began before."""
        if sequence.is_resumed:
            return
        sequence.num_first_computed = sequence.num_tokens - sequence.num_cached(instance.instance)
        self._started.append(Started(now, instance.role, sequence.num_tokens, sequence.num_first_computed))

    def ended(self, sequence: SequenceEntry, now: float) -> None:
        """Note a sequence that came to its end."""
        num_prompt_tokens = sequence.num_tokens - sequence.num_answer_tokens
        num_computed = min(sequence.num_first_computed or num_prompt_tokens, num_prompt_tokens)
        self._ended.append(
            EndedSequence(sequence.arrived_s, num_computed, num_prompt_tokens, sequence.num_answer_tokens)
        )
        self.num_ended += 1

    def span_s(self, now: float) -> float:
        """Return how many of the last ``RECENT_S`` seconds were watched; 0 before the first arrival."""
        return 0.0 if self._since_s is None else min(RECENT_S, now - self._since_s)

    def arrivals(self, now: float) -> Sequence[Arrival]:
        """Return the recent arrivals."""
        self._forget(now)
        return self._arrivals

    def starts(self, now: float) -> Sequence[Started]:
        """Return the recent starts."""
        self._forget(now)
        return self._started

    def last_ended(self, count: int) -> list[EndedSequence]:
        """Return the last sequences that ended, ``count`` at most, in the order of their ends."""
        first = max(0, len(self._ended) - count)
        return [self._ended[index] for index in range(first, len(self._ended))]

    def _forget(self, now: float) -> None:
        while self._arrivals and self._arrivals[0].time_s < now - RECENT_S:
            self._arrivals.popleft()
        while self._started and self._started[0].time_s < now - RECENT_S:
            self._started.popleft()
