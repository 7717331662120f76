"""What was asked of a deployment lately, and what came of it: the ground of autoscaling and re-planning. Pure."""

from collections import deque
from collections.abc import Callable, Sequence
from heapq import merge
from itertools import islice
from typing import Final, NamedTuple, TypeVar

from disagg.base.ids import RouterId
from disagg.scheduling.dispatch.sequence_sample import SequenceSample
from disagg.scheduling.dispatch.state import InstanceEntry, SequenceEntry
from disagg.scheduling.dispatch.workload_report import Answered, Arrival, Started, WorkloadReport

RECENT_S: Final = 30.0
"""Arrivals and starts that count as recent."""
_MOST_ARRIVALS: Final = 20_000
_MOST_TAKEN: Final = 4096
_MOST_ANSWERS: Final = 64


_Row = TypeVar("_Row")


class WorkloadCounts(NamedTuple):
    """What was noted since the beginning."""

    arrived: int = 0
    started: int = 0
    taken: int = 0
    ended: int = 0


class WorkloadWindow:
    """The sequences of the last ``RECENT_S`` seconds, and the last few thousand that were taken, as they arrived.

    It stays empty where nobody looks at it. ``merge`` fills it with what several routers have noted in theirs.
    """

    def __init__(self) -> None:
        self._arrivals: deque[Arrival] = deque(maxlen=_MOST_ARRIVALS)
        self._started: deque[Started] = deque(maxlen=_MOST_ARRIVALS)
        self._taken: deque[SequenceSample] = deque(maxlen=_MOST_TAKEN)
        self._answers: deque[Answered] = deque(maxlen=_MOST_ANSWERS)
        self._reported: dict[tuple[RouterId, int], SequenceSample] = {}
        """Sequences of others that have not ended, with their numbers there."""
        self._since_s: float | None = None
        self._num_arrived = self._num_started = 0
        self.num_taken = self.num_ended = 0
        """Since the beginning."""

    def arrived(self, num_prompt_tokens: int, now: float) -> None:
        """Note an arrival, also of what is refused."""
        if self._since_s is None:
            self._since_s = now
        self._arrivals.append(Arrival(now, num_prompt_tokens))
        self._num_arrived += 1
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
        self._num_started += 1

    def brought(self, sequence: SequenceEntry) -> None:
        """Note that tokens of an answer came."""
        if sequence.sample is not None:
            sequence.sample.num_answer_tokens = sequence.num_answer_tokens

    def ended(self, sequence: SequenceEntry, *, has_kept: bool) -> None:
        """Note a sequence that came to its end, and whether it kept its objectives."""
        if sequence.sample is None:
            return
        sequence.sample.has_ended, sequence.sample.has_kept = True, has_kept
        self._answers.append(Answered(sequence.last_token_s, sequence.num_answer_tokens))
        self.num_ended += 1

    @property
    def counts(self) -> WorkloadCounts:
        """How much was noted until now."""
        return WorkloadCounts(self._num_arrived, self._num_started, self.num_taken, self.num_ended)

    def news(self, since: WorkloadCounts) -> WorkloadReport:
        """Return what was noted after ``since``, but for what became of the sequences that were taken."""
        num_ended = self.num_ended - since.ended
        return WorkloadReport(
            arrivals=_last(self._arrivals, self._num_arrived - since.arrived),
            starts=_last(self._started, self._num_started - since.started),
            answers=_last(self._answers, num_ended),
            num_ended=num_ended,
        )

    def merge(self, router: RouterId, report: WorkloadReport) -> None:
        """Note what one of several routers has noted, as if its sequences had passed here."""
        if report.arrivals:
            first_s = report.arrivals[0].time_s
            self._since_s = first_s if self._since_s is None else min(first_s, self._since_s)
        _put_in(self._arrivals, report.arrivals, lambda one: one.time_s)
        _put_in(self._started, report.starts, lambda one: one.time_s)
        _put_in(self._answers, report.answers, lambda one: one.time_s)
        self.num_ended += report.num_ended
        self._merge_samples(router, report)

    def _merge_samples(self, router: RouterId, report: WorkloadReport) -> None:
        for one in report.changed:
            known = self._reported.get((router, one.number))
            if known is not None:
                known.become(one.sample)
                if known.has_ended:
                    del self._reported[router, one.number]
        for one in report.taken:
            if not one.sample.has_ended:
                self._reported[router, one.number] = one.sample
        while len(self._reported) > _MOST_TAKEN:
            del self._reported[next(iter(self._reported))]  # the window has forgotten it, too
        _put_in(self._taken, [one.sample for one in report.taken], lambda one: one.arrival_s)
        self.num_taken += len(report.taken)

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
        return [one.num_tokens for one in self._answers]

    def taken(self, first: int, count: int) -> list[SequenceSample]:
        """Return ``count`` sequences in the order of arrival, from the one of this number on; fewer where some are
        forgotten or still to come. They change as their answers go on.
        """
        forgotten = self.oldest_taken
        return list(islice(self._taken, max(0, first - forgotten), max(0, first + count - forgotten)))

    @property
    def oldest_taken(self) -> int:
        """Return the number of the first sequence that is not forgotten."""
        return self.num_taken - len(self._taken)

    def _forget(self, now: float) -> None:
        while self._arrivals and self._arrivals[0].time_s < now - RECENT_S:
            self._arrivals.popleft()
        while self._started and self._started[0].time_s < now - RECENT_S:
            self._started.popleft()


def _last(rows: Sequence[_Row], count: int) -> tuple[_Row, ...]:
    """Return the last rows, at most so many."""
    return tuple(islice(rows, max(0, len(rows) - count), None))


def _put_in(rows: deque[_Row], news: Sequence[_Row], time_s: Callable[[_Row], float]) -> None:
    """Add rows in order of time, where a few of those that are there may be later."""
    later = []
    while news and rows and time_s(rows[-1]) > time_s(news[0]):
        later.append(rows.pop())
    rows.extend(merge(reversed(later), news, key=time_s))
