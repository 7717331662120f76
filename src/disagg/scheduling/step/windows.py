"""Which blocks of a sequence have those of layers with a sliding window beside them. Pure arithmetic."""

from collections.abc import Iterable

from disagg.base.ids import BlockHash, BlockId
from disagg.base.window_blocks import WindowBlocks
from disagg.cache.block_pool import WindowName
from disagg.scheduling.step.sequence import Sequence


class Windows:
    """Of a model without such layers no block has any.

    Blocks are counted from a sequence's first one. At most ``most_in_sight`` in a row have blocks beside them.
    """

    def __init__(self, window: WindowBlocks | None, block_size: int, most_in_sight: int) -> None:
        self._window = window
        self._block_size = block_size
        self._most_in_sight = most_in_sight
        self.num_each = 0 if window is None else window.num_each
        """Blocks beside each one."""

    def first_seen(self, num_tokens: int) -> int:
        """Return the first block that needs those beside it for what follows ``num_tokens`` tokens."""
        return 0 if self._window is None else self._window.first_seen(num_tokens, self._block_size)

    def last_seen(self, block: int) -> int:
        """Return after how many tokens at most a block still needs those beside it; there has to be a window."""
        assert self._window is not None, "without one nothing is beside a block"
        return self._window.last_seen(block, self._block_size)

    def end(self, first: int, num_blocks: int) -> int:
        """Return up to which of so many blocks a sequence takes those beside them, from block ``first`` on."""
        return min(num_blocks, first + self._most_in_sight)

    def names(self, prefixes: Iterable[BlockHash]) -> list[WindowName]:
        """Return the names of the blocks beside those that have these names, in order."""
        return [(name, part) for name in prefixes for part in range(self.num_each)]

    def held(self, sequence: Sequence, first: int, end: int) -> tuple[BlockId, ...]:
        """Return what a sequence holds beside its blocks from ``first`` to before ``end``, as far as it does."""
        start = sequence.first_in_window
        return sequence.window_ids[max(0, first - start) * self.num_each : max(0, end - start) * self.num_each]

    def num_offered(self, num_tokens: int, first: int, end: int) -> int:
        """Return how many blocks an offer has of those from ``first`` to before ``end``, and beside them.

        Whoever reads them goes on after ``num_tokens`` tokens.
        """
        window = self._window
        return end - first + (0 if window is None else window.num_beside(num_tokens, self._block_size, first, end))
