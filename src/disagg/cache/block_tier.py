"""Which blocks are kept behind an instance's pool, in host memory or on disk: names, the oldest first. No I/O."""

from collections import OrderedDict
from collections.abc import Iterable

from disagg.base.ids import BlockHash
from disagg.base.kv_events import Medium


class BlockTier:
    """Names of the blocks in ``medium``, ``max_blocks`` at most, and of those that are being written.

    ``saved`` are there from the start.
    """

    def __init__(self, medium: Medium, max_blocks: int, saved: Iterable[BlockHash] = ()) -> None:
        self.medium = medium
        self.max_blocks = max_blocks
        self._saved: OrderedDict[BlockHash, None] = OrderedDict.fromkeys(saved)
        self._saving: set[BlockHash] = set()

    def __len__(self) -> int:
        return len(self._saved)

    def __contains__(self, name: BlockHash) -> bool:
        return name in self._saved

    @property
    def names(self) -> tuple[BlockHash, ...]:
        """Names of all blocks that are there."""
        return tuple(self._saved)

    def lacks(self, name: BlockHash) -> bool:
        """Return whether a block is neither there nor on its way there."""
        return name not in self._saved and name not in self._saving

    def begin_save(self, name: BlockHash) -> tuple[BlockHash, ...]:
        """Note that a block is being written; return the names of those that have to go for it."""
        self._saving.add(name)
        dropped = []
        while self._saved and len(self._saved) + len(self._saving) > self.max_blocks:
            dropped.append(self._saved.popitem(last=False)[0])
        return tuple(dropped)

    def end_save(self, name: BlockHash, *, is_there: bool) -> None:
        """Note how the writing of a block ended."""
        self._saving.discard(name)
        if is_there:
            self._saved[name] = None

    def touch(self, names: Iterable[BlockHash]) -> None:
        """Note that blocks were used: those of them that are there are dropped later. The first of them last."""
        for name in reversed(tuple(names)):
            if name in self._saved:
                self._saved.move_to_end(name)

    def forget(self, name: BlockHash) -> bool:
        """Note that a block cannot be read; return False when it was not there."""
        if name not in self._saved:
            return False
        del self._saved[name]
        return True
