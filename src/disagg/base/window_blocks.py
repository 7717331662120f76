"""KV blocks of layers with a sliding window: the one rule of how many there are, for pools, policy and simulator."""

from typing import Annotated

import msgspec
from msgspec import Meta


class WindowBlocks(msgspec.Struct, frozen=True):
    """Layers of which a token sees the last ``tokens`` tokens alone, itself included, have KV blocks of their own.

    For each block of the other layers there are ``num_each``, until no later token sees any of its tokens.
    """

    tokens: Annotated[int, Meta(ge=1)]
    num_each: Annotated[int, Meta(ge=1)]

    def first_seen(self, num_tokens: int, block_size: int) -> int:
        """Return the first block of which the token after ``num_tokens`` tokens, or any later one, sees a part."""
        return max(0, num_tokens - self.tokens + 1) // block_size

    def last_seen(self, block: int, block_size: int) -> int:
        """Return after how many tokens at most a later one still sees a part of a block."""
        return (block + 1) * block_size + self.tokens - 2

    def num_beside(self, num_tokens: int, block_size: int, first: int, end: int) -> int:
        """Return how many there are beside blocks ``first`` to before ``end`` of what follows ``num_tokens`` tokens."""
        return self.num_each * max(0, end - max(first, self.first_seen(num_tokens, block_size)))

    def held_share(self, num_tokens: float, num_sequences: int = 1) -> float:
        """Return about what share of all blocks of so many tokens is held, where sequences are alike."""
        in_sight = min(1.0, self.tokens * num_sequences / max(num_tokens, 1.0))
        return (1 + self.num_each * in_sight) / (1 + self.num_each)

    def most_in_sight(self, num_computed_at_once: int, block_size: int) -> int:
        """Return how many blocks in a row at most hold so many new tokens and what the first of them sees."""
        return (self.tokens + num_computed_at_once + 2 * block_size - 3) // block_size
