"""Blocks on their way to the tiers behind an instance's pool, host memory and disk: which are worth writing, and when.

A block is written when its sequence ends here, as the next turn of a conversation begins with it, when another
instance goes on with it, as that turn may come here, and when it was found a second time, as it will be found again.
Each tier gets it from the pool, so that none reads another, and what the smaller one has no room for any more is in the
larger one.
Writing waits for no eviction, as then it would have to be waited for. Reads are pulls from a source that is no
instance: see ``HandOvers``.
"""

from collections import deque
from collections.abc import Iterable
from typing import Final

from disagg.base.ids import BlockHash
from disagg.cache.block_tier import BlockTier
from disagg.scheduling.step.actions import DropSaved, SaveBlock
from disagg.scheduling.step.books import Books
from disagg.scheduling.step.events import BlockSaved, TierRead
from disagg.scheduling.step.sequence import Sequence

MAX_SAVES_IN_FLIGHT: Final = 4
"""Blocks that are held for a tier at once; a sixteenth of a small pool at most."""
MAX_SAVES_WAITING: Final = 8192
"""Names that wait to be written. When there are more the oldest are given up: they may be evicted before."""


class TierMoves:
    """Writes of one instance to all its tiers."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self._writers = {tier.medium: _Writer(books, tier) for tier in books.ledger.tiers}

    def sequence_leaves(self, sequence: Sequence) -> None:
        """Let the blocks of a sequence that ends or goes on elsewhere be written; call it before they are freed."""
        for writer in self._writers.values():
            writer.want(sequence.block_hashes[: sequence.num_published])

    def start_saves(self) -> None:
        """Let the next blocks be written, as many as may be under way at once."""
        found_again = self._books.ledger.take_found_again()
        for writer in self._writers.values():
            writer.want(found_again)
            writer.start()

    def on_saved(self, saved: BlockSaved) -> None:
        """A block was written, or could not be."""
        self._writers[saved.medium].end(saved.name, is_there=not saved.failure)

    def on_read(self, reads: Iterable[TierRead]) -> None:
        """Blocks were read; some of them may be torn, foreign or gone."""
        for read in reads:
            if read.unreadable:
                self._writers[read.medium].forget(read.unreadable)


class _Writer:
    """Writes of one instance to one tier."""

    def __init__(self, books: Books, tier: BlockTier) -> None:
        self._books = books
        self._tier = tier
        self._waiting: deque[BlockHash] = deque(maxlen=MAX_SAVES_WAITING)
        self._num_in_flight = 0
        self._most_in_flight = max(1, min(MAX_SAVES_IN_FLIGHT, books.ledger.pool.num_blocks // 16))

    def want(self, names: Iterable[BlockHash]) -> None:
        """Let blocks be written that are not there."""
        self._tier.touch(names)
        self._waiting.extend(name for name in names if self._tier.lacks(name))

    def start(self) -> None:
        ledger, medium = self._books.ledger, self._tier.medium
        while self._waiting and self._num_in_flight < self._most_in_flight:
            name = self._waiting.popleft()
            block = ledger.begin_save(name, medium) if self._tier.lacks(name) else None
            if block is None:
                continue
            self._drop(self._tier.begin_save(name))
            self._num_in_flight += 1
            self._books.actions.append(SaveBlock(block=block, name=name, medium=medium))

    def end(self, name: BlockHash, *, is_there: bool) -> None:
        ledger, medium = self._books.ledger, self._tier.medium
        self._num_in_flight -= 1
        ledger.end_save(name, medium)
        self._tier.end_save(name, is_there=is_there)
        if is_there:
            ledger.journal.saved(name, medium)

    def forget(self, names: Iterable[BlockHash]) -> None:
        """Blocks cannot be read."""
        self._drop([name for name in names if self._tier.forget(name)])

    def _drop(self, names: Iterable[BlockHash]) -> None:
        dropped, medium = tuple(names), self._tier.medium
        for name in dropped:
            self._books.ledger.journal.removed(name, medium)
        if dropped:
            self._books.actions.append(DropSaved(names=dropped, medium=medium))
