"""What became of the cached blocks of one instance since somebody last asked: the events that others index."""

from collections.abc import Sequence

from disagg.base.ids import BlockHash
from disagg.base.kv_events import AnyKvEvent, BlockRemoved, BlockStored, Medium


class KvJournal:
    """Events in the order in which they happened; neighbouring removals become one."""

    def __init__(self, block_size: int, pool: Medium) -> None:
        self._block_size = block_size
        self._pool = pool
        self._events: list[AnyKvEvent] = []
        self._removed: list[BlockHash] = []
        self._removed_from = pool

    def stored(self, names: Sequence[BlockHash], parent: BlockHash | None = None, medium: Medium | None = None) -> None:
        """Blocks can be found under these names from now on; None stands for the pool itself."""
        self._end_removals()
        self._events.append(BlockStored(tuple(names), parent, (), self._block_size, None, medium or self._pool))

    def removed(self, name: BlockHash, medium: Medium | None = None) -> None:
        """The block of this name can be found no more."""
        source = medium or self._pool
        if source is not self._removed_from:
            self._end_removals()
            self._removed_from = source
        self._removed.append(name)

    def take(self) -> tuple[AnyKvEvent, ...]:
        """Return the events since the last call."""
        if self._removed:
            self._end_removals()
        if not self._events:
            return ()
        events, self._events = tuple(self._events), []
        return events

    def _end_removals(self) -> None:
        if self._removed:
            self._events.append(BlockRemoved(tuple(self._removed), self._removed_from))
            self._removed = []
