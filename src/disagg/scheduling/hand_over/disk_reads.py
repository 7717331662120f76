"""Which blocks on disk a sequence reads, and which it had rather compute: by what either is predicted to take.

What reads take is learned from those that end, what computing takes from the steps. Reading goes on beside the steps,
so that whatever comes while a sequence would wait for its turn anyway is read in no time. Beyond that, each block read
costs the same and each block computed more than the one before it: the first token comes soonest either with all that
is on disk, or with no more than what comes while the sequence waits.
"""

from collections.abc import Iterable
from typing import Final

from disagg.costs.latency import StepShape
from disagg.costs.step_times import StepTimes
from disagg.scheduling.step.books import Books
from disagg.scheduling.step.sequence import Sequence

MOST_READS_AHEAD: Final = 4
"""Reads under way while sequences wait that are served before: enough to keep a disk busy from turn to turn."""
_KEPT: Final = 0.9
"""Of what earlier reads taught, by each further one."""
_DOUBT: Final = 0.98
"""What each block is taken to take after a decision against it: a disk that was slow once is tried again."""


class DiskReads:
    """Predicts the reads of one instance. Without ``times`` all is read."""

    def __init__(self, books: Books, times: StepTimes | None) -> None:
        self._books = books
        self._times = times
        self._block_s: float | None = None
        self._num_blocks_in_flight = 0
        self.num_in_flight = 0

    def wanted(self, sequence: Sequence, others: Iterable[Sequence]) -> tuple[int, int]:
        """Return up to which of its blocks a sequence that has just arrived is to read what is on disk, and how many.

        ``others`` wait to read theirs.
        """
        ledger, times = self._books.ledger, self._times
        first, end = ledger.on_disk(sequence)
        if first == end:
            return 0, 0
        block_s = self._block_s
        if block_s is None or times is None or not times.knows_prefill:
            return end, end - first
        turn_s = self._until_turn_s(sequence, times)
        num_before = self._num_blocks_in_flight + sum(other.num_to_read for other in others if other.remote is None)
        in_time = first + min(end - first, max(0, int(turn_s / block_s) - num_before))
        spared_s = self._compute_s(sequence, in_time, times) - self._compute_s(sequence, end, times)
        if block_s * (num_before + end - first) <= turn_s + spared_s:
            return end, end - first
        self._block_s = block_s * _DOUBT
        return in_time, in_time - first

    def started(self, num_blocks: int) -> None:
        """Blocks are being read."""
        self.num_in_flight += 1
        self._num_blocks_in_flight += num_blocks

    def ended(self, num_blocks: int, duration_s: float) -> None:
        """A read of so many blocks has ended, which took so long; 0 was not measured."""
        self.num_in_flight -= 1
        self._num_blocks_in_flight -= num_blocks
        if duration_s > 0:
            its_block_s = duration_s / num_blocks
            known_s = its_block_s if self._block_s is None else self._block_s
            self._block_s = _KEPT * known_s + (1 - _KEPT) * its_block_s

    def may_read_ahead(self, sequence: Sequence) -> bool:
        """Return whether a sequence may be given blocks before those that wait and are served before it.

        It may while there are places and blocks for all of those too.
        """
        books, ledger = self._books, self._books.ledger
        if sequence.remote is not None or self.num_in_flight >= MOST_READS_AHEAD:
            return False
        earlier = [other for other in books.waiting if other.order < sequence.order]
        num_blocks = sum(ledger.num_blocks_for(other.num_tokens) for other in (*earlier, sequence))
        num_places = len(books.running) + books.num_pulling + len(earlier)
        return num_places < books.settings.max_batch_size and ledger.has_room_for(num_blocks)

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
