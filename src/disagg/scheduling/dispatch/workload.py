"""What was asked of a deployment lately, and what came of it: the ground of autoscaling and re-planning. Pure."""

from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import Final

import msgspec

from disagg.base.request import Role
from disagg.scheduling.dispatch.sequence_sample import SequenceSample
from disagg.scheduling.dispatch.state import InstanceEntry, SequenceEntry

RECENT_S: Final = 30.0
"""Arrivals and starts that count as recent."""
_MOST_ARRIVALS: Final = 20_000
_MOST_TAKEN: Final = 4096
_MOST_ANSWERS: Final = 64


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


class WorkloadWindow:
    """The sequences of the last ``RECENT_S`` seconds, and the last few thousand that were taken, as they arrived.

    It stays empty where nobody looks at it.
    """

    def __init__(self) -> None:
        self._arrivals: deque[Arrival] = deque(maxlen=_MOST_ARRIVALS)
        self._started: deque[Started] = deque(maxlen=_MOST_ARRIVALS)
        self._taken: deque[SequenceSample] = deque(maxlen=_MOST_TAKEN)
        self._answers: deque[int] = deque(maxlen=_MOST_ANSWERS)
        self._since_s: float | None = None
        self.num_taken = self.num_ended = 0
        """Since the beginning."""

    def arrived(self, num_prompt_tokens: int, now: float) -> None:
        """Note an arrival, also of what is refused."""
        if self._since_s is None:
            self._since_s = now
        self._arrivals.append(Arrival(now, num_prompt_tokens))
        self._forget(now)

    def take(self, sequence: SequenceEntry) -> None:
        """Note a sequence that was not refused."""
        sequence.sample = SequenceSample(sequence.arrived_s, sequence.num_tokens, sequence.num_tokens)
        self._taken.append(sequence.sample)
        self.num_taken += 1

    def started(self, sequence: SequenceEntry, instance: InstanceEntry, now: float) -> None:
        """Note that an instance begins a sequence; one that is resumed began before."""
        if sequence.is_resumed or sequence.sample is None:
            return
        sequence.sample.num_computed_tokens = sequence.num_tokens - sequence.num_cached(instance.instance)
        self._started.append(Started(now, instance.role, sequence.num_tokens, sequence.sample.num_computed_tokens))

    def brought(self, sequence: SequenceEntry) -> None:
        """Note that tokens of an answer came."""
        if sequence.sample is not None:
            sequence.sample.num_answer_tokens = sequence.num_answer_tokens

    def ended(self, sequence: SequenceEntry, *, has_kept: bool) -> None:
        """Note a sequence that came to its end, and whether it kept its objectives."""
        if sequence.sample is None:
            return
        sequence.sample.has_ended, sequence.sample.has_kept = True, has_kept
        self._answers.append(sequence.num_answer_tokens)
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

    @property
    def answers(self) -> Sequence[int]:
        """Return the tokens of the last answers that ended."""
        return self._answers

    def taken(self, first: int, count: int) -> list[SequenceSample]:
        """Return ``count`` sequences in the order of arrival, from the one of this number on; fewer where some are
        forgotten or still to come. They change as their answers go on.
        """
        forgotten = self.num_taken - len(self._taken)
        return list(islice(self._taken, max(0, first - forgotten), max(0, first + count - forgotten)))

    def _forget(self, now: float) -> None:
        while self._arrivals and self._arrivals[0].time_s < now - RECENT_S:
            self._arrivals.popleft()
        while self._started and self._started[0].time_s < now - RECENT_S:
            self._started.popleft()
