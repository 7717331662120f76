"""Which blocks in the tiers behind the pool a sequence reads, and which it had rather compute: by what either takes.

What a block of each tier takes is learned from reads that end, what computing takes from the steps. Tiers are read
beside the steps and beside each other, so that whatever comes while a sequence would wait for its turn anyway is read
in no time. Reading delays its own sequence alone, computing those as well that come meanwhile: both delays count.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Final

from disagg.base.kv_events import Medium
from disagg.costs.latency import StepShape
from disagg.costs.step_times import StepTimes
from disagg.scheduling.recent_work import RecentWork
from disagg.scheduling.step.actions import BlockLoad
from disagg.scheduling.step.books import Books
from disagg.scheduling.step.events import TierRead
from disagg.scheduling.step.sequence import Sequence

MOST_READS_AHEAD: Final = 4
"""Reads under way while sequences wait that are served before: enough to keep a tier busy from turn to turn."""
_LEAST_IDLE: Final = 0.1
"""Part of the time that an instance is taken to have nothing to prefill, at least: a burst is no overload for good."""
_ROUNDING_S: Final = 1e-9
_KEPT: Final = 0.9
"""Of what earlier reads taught, by each further one."""
_DOUBT: Final = 0.98
"""What a block is taken to take after a decision against reading it: what was slow once is tried again."""


class TierReads:
    """Predicts the reads of one instance. Without ``times`` all is read."""

    def __init__(self, books: Books, times: StepTimes | None) -> None:
        self._books = books
        self._times = times
        self._block_s: dict[Medium, float] = {}
        self._in_flight: Counter[Medium] = Counter()
        """Blocks."""
        self._num_in_flight = 0
        self._arrivals = RecentWork()
        self._prefill = RecentWork()
        """Sequences that came in a second lately, and seconds of prefill that they brought."""

    def choose(self, sequence: Sequence, others: Iterable[Sequence]) -> None:
        """Choose which of its blocks a sequence that has just arrived is to read; ``others`` wait to read theirs."""
        first, media = self._books.ledger.in_tiers(sequence)
        num_to_read = self._num_worth_reading(sequence, first, media, others) if media else 0
        sequence.to_read, sequence.end_of_read = media[:num_to_read], first + num_to_read
        if self._books.ledger.tiers and self._times is not None and self._times.knows_prefill:
            self._arrivals.add(1.0, self._books.now)
            self._prefill.add(self._compute_s(sequence, first + num_to_read, self._times), self._books.now)

    def started(self, loads: Iterable[BlockLoad]) -> None:
        """Blocks are being read."""
        self._num_in_flight += 1
        self._in_flight.update(load.medium for load in loads)

    def ended(self, reads: Iterable[TierRead]) -> None:
        """A read has ended."""
        self._num_in_flight -= 1
        for read in reads:
            self._in_flight[read.medium] -= read.num_blocks
            if read.duration_s > 0:
                block_s = read.duration_s / read.num_blocks
                self._block_s[read.medium] = _KEPT * self._block_s.get(read.medium, block_s) + (1 - _KEPT) * block_s

    def may_read_ahead(self, sequence: Sequence) -> bool:
        """Return whether a sequence may be given blocks before those that wait and are served before it.

        It may while there are places and blocks for all of those too.
        """
        books, ledger = self._books, self._books.ledger
        if sequence.remote is not None or self._num_in_flight >= MOST_READS_AHEAD:
            return False
        earlier = [other for other in books.waiting if other.order < sequence.order]
        num_blocks = sum(ledger.num_blocks_for(other.num_tokens) for other in (*earlier, sequence))
        num_places = len(books.running) + books.num_pulling + len(earlier)
        return num_places < books.settings.max_batch_size and ledger.has_room_for(num_blocks)

    def _num_worth_reading(
        self, sequence: Sequence, first: int, media: tuple[Medium, ...], others: Iterable[Sequence]
    ) -> int:
        """Return how many of the blocks behind the first ones, which are in these media, are to be read."""
        times = self._times
        if times is None or not times.knows_prefill or not self._block_s.keys() >= set(media):
            return len(media)
        before = self._in_flight + Counter(medium for other in others for medium in other.to_read)
        end_s = {medium: before[medium] * block_s for medium, block_s in self._block_s.items()}
        turn_s = self._until_turn_s(sequence, times)
        best, best_s = 0, math.inf
        for count, read_s in ((0, turn_s), *self._cuts(media, turn_s, end_s)):
            compute_s = self._compute_s(sequence, first + count, times)
            cost_s = read_s + compute_s + self._delay_of_others_s(compute_s)
            if cost_s <= best_s:
                best, best_s = count, cost_s
        for medium in set(media[best:]):
            self._block_s[medium] *= _DOUBT
        return best

    def _cuts(
        self, media: tuple[Medium, ...], turn_s: float, end_s: dict[Medium, float]
    ) -> Iterator[tuple[int, float]]:
        """Yield how many of the blocks in these media it may be best to read, and when they and the turn have come.

        Between two cuts each block read takes the same and each block computed longer than the one before it: there the
        first token comes soonest at an end. ``end_s``: when each tier has read what it was given before.
        """
        latest_s, step_s = turn_s, 0.0
        for count, medium in enumerate(media):
            end_s[medium] += self._block_s[medium]
            later_s = max(latest_s, end_s[medium])
            if later_s - latest_s > step_s + _ROUNDING_S:
                yield count, latest_s
            latest_s, step_s = later_s, later_s - latest_s
        yield len(media), latest_s

    def _delay_of_others_s(self, compute_s: float) -> float:
        """Return the seconds that computing delays the sequences that come meanwhile, in sum.

        It lengthens the time until the instance has nothing to prefill by ``compute_s`` and what comes in that time,
        and whoever comes then waits for half of it on average.
        """
        now = self._books.now
        idle = max(_LEAST_IDLE, 1 - self._prefill.share(now))
        return self._arrivals.share(now) * compute_s**2 / (2 * idle)

    def _until_turn_s(self, sequence: Sequence, times: StepTimes) -> float:
        """Return the seconds of the prompts that are computed before this one.

        How far the step in flight is and what is cached of those that wait is not known: they count as a whole.
        """
        ahead = StepShape()
        for other in (*self._books.running, *self._books.waiting):
            num_left = other.num_tokens - other.num_computed
            if num_left > 1 and other.order < sequence.order:
                ahead.add_prefill(other.num_computed, num_left)
        return times.predict_s(ahead) if ahead.num_prefills else 0.0

    def _compute_s(self, sequence: Sequence, num_blocks: int, times: StepTimes) -> float:
        """Return the seconds of computing all but a sequence's first blocks."""
        shape, start = StepShape(), num_blocks * self._books.ledger.block_size
        shape.add_prefill(start, sequence.num_tokens - start)
        return times.predict_s(shape)
