"""What a read takes of each of the peer's blocks: all of it into one block, or into parts of several or of one."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from disagg.base.ids import BlockId

BlockPair = tuple[BlockId, BlockId]
"""A block of the peer's pool and the block of the own pool that receives its bytes, or a part of them."""


class SourceBlock(NamedTuple):
    """One block of the peer, and where it goes: each target with the part that the smaller block is of the larger."""

    block: BlockId
    pieces: Sequence[tuple[BlockId, int]]

    @property
    def target(self) -> BlockId:
        """Where all of it goes, between pools of one form."""
        return self.pieces[0][0]


def by_source(pairs: Iterable[BlockPair], parts: Sequence[int]) -> list[SourceBlock]:
    """Join the pairs that read the same block one after the other; without ``parts`` each pair is a whole block."""
    if not parts:
        return [SourceBlock(source, ((target, 0),)) for source, target in pairs]
    found: list[tuple[BlockId, list[tuple[BlockId, int]]]] = []
    for (source, target), part in zip(pairs, parts, strict=True):
        if found and found[-1][0] == source:
            found[-1][1].append((target, part))
        else:
            found.append((source, [(target, part)]))
    return [SourceBlock(source, pieces) for source, pieces in found]


def targets_of(blocks: Iterable[SourceBlock]) -> tuple[list[BlockId], list[int]]:
    """Return the targets of all pieces of these blocks, and their parts."""
    pieces = [piece for block in blocks for piece in block.pieces]
    return [target for target, _ in pieces], [part for _, part in pieces]
