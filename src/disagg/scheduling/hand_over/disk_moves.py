"""Blocks on their way to an instance's disk and back: which are worth writing, and which sequences wait for theirs.

A block is written when its sequence ends here, as the next turn of a conversation begins with it, and when it was found
a second time, as it will be found again. What passes through to another instance is not: it ends there. Writing waits
for no eviction, as then it would have to be waited for. Blocks that are read are reserved like those of a pull, so
that no step waits for a disk.
"""

from collections import deque
from collections.abc import Iterable
from typing import Final

from disagg.base.ids import BlockHash
from disagg.base.kv_events import Medium
from disagg.scheduling.step.actions import DropSaved, SaveBlock
from disagg.scheduling.step.books import Books
from disagg.scheduling.step.sequence import Sequence

MAX_SAVES_IN_FLIGHT: Final = 4
"""Blocks that are held for the disk at once; a sixteenth of a small pool at most."""
MAX_SAVES_WAITING: Final = 8192
"""Names that wait to be written. When there are more the oldest are given up: they may be evicted before."""


class DiskMoves:
    """Writes of one instance. Reads are pulls from a source that is no instance: see ``HandOvers``."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self._waiting: deque[BlockHash] = deque(maxlen=MAX_SAVES_WAITING)
        self._num_in_flight = 0
        self._most_in_flight = max(1, min(MAX_SAVES_IN_FLIGHT, books.ledger.pool.num_blocks // 16))

    def sequence_ended(self, sequence: Sequence) -> None:
        """Let the blocks of a sequence that comes to its end here be written; call it before they are freed."""
        if self._books.ledger.disk.max_blocks:
            self._want(sequence.block_hashes[: sequence.num_published])

    def start_saves(self) -> None:
        """Let the next blocks be written, as many as may be under way at once."""
        ledger = self._books.ledger
        if not ledger.disk.max_blocks:
            return
        self._want(ledger.take_found_again())
        while self._waiting and self._num_in_flight < self._most_in_flight:
            name = self._waiting.popleft()
            block = ledger.begin_save(name) if ledger.disk.lacks(name) else None
            if block is None:
                continue
            self._drop(ledger.disk.begin_save(name))
            self._num_in_flight += 1
            self._books.actions.append(SaveBlock(block=block, name=name))

    def on_saved(self, name: BlockHash, *, is_there: bool) -> None:
        """A block was written, or could not be."""
        ledger = self._books.ledger
        self._num_in_flight -= 1
        ledger.end_save(name)
        ledger.disk.end_save(name, is_there=is_there)
        if is_there:
            ledger.journal.saved(name)

    def on_unreadable(self, names: Iterable[BlockHash]) -> None:
        """The files of these blocks are torn, foreign or gone."""
        self._drop([name for name in names if self._books.ledger.disk.forget(name)])

    def _want(self, names: Iterable[BlockHash]) -> None:
        disk = self._books.ledger.disk
        disk.touch(names)
        self._waiting.extend(name for name in names if disk.lacks(name))

    def _drop(self, names: Iterable[BlockHash]) -> None:
        dropped = tuple(names)
        for name in dropped:
            self._books.ledger.journal.removed(name, Medium.DISK)
        if dropped:
            self._books.actions.append(DropSaved(names=dropped))
