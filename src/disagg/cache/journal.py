"""What became of the cached blocks of one instance since somebody last asked: the events that others index."""

from collections.abc import Sequence

from disagg.base.ids import BlockHash, RequestId
from disagg.base.kv_events import AnyKvEvent, BlockRemoved, BlockStored, Medium

Owner = tuple[RequestId, int]
"""A sequence whose blocks an event is about, and which of them is the first."""


class KvJournal:
    """Events in the order in which they happened; neighbouring removals become one."""

    def __init__(self, block_size: int, pool: Medium) -> None:
        self._block_size = block_size
        self._pool = pool
        self._events: list[AnyKvEvent] = []
        self._owners: list[Owner | None] = []
        self._removed: list[BlockHash] = []
        self._removed_from = pool
        self.has_news = False
        """Whether ``take`` would return any event."""

    def stored(self, names: Sequence[BlockHash], parent: BlockHash | None, owner: Owner) -> None:
        """Blocks of a sequence, behind the block ``parent``, can be found in the pool from now on."""
        self._end_removals()
        self.has_news = True
        self._events.append(BlockStored(tuple(names), parent, (), self._block_size, None, self._pool))
        self._owners.append(owner)

    def saved(self, name: BlockHash, medium: Medium) -> None:
        """A block can be found in a tier behind the pool from now on."""
        self._end_removals()
        self.has_news = True
        self._events.append(BlockStored((name,), None, (), self._block_size, None, medium))
        self._owners.append(None)

    def removed(self, name: BlockHash, medium: Medium | None = None) -> None:
        """The block of this name can be found no more."""
        source = medium or self._pool
        if source is not self._removed_from:
            self._end_removals()
            self._removed_from = source
        self.has_news = True
        self._removed.append(name)

    def take(self) -> tuple[tuple[AnyKvEvent, ...], tuple[Owner | None, ...]]:
        """Return the events since the last call, and whose blocks each is about, where that is known."""
        if self._removed:
            self._end_removals()
        events, owners = tuple(self._events), tuple(self._owners)
        self._events, self._owners, self.has_news = [], [], False
        return events, owners

    def _end_removals(self) -> None:
        if self._removed:
            self._events.append(BlockRemoved(tuple(self._removed), self._removed_from))
            self._owners.append(None)
            self._removed = []
