"""Digests of KV blocks: made where they were computed, checked where they are used.

A block's digest is XXH3-64 over the XXH3-64 digests of its layers, so that layers can be hashed as they arrive and an
offer carries 8 bytes for each block however many layers there are. It finds what goes wrong by itself (blocks freed
too early, a bad layout, a bad link); it is no defence against somebody who forges blocks.
"""

from collections.abc import Iterable, Sequence
from typing import Final

from xxhash import xxh3_64_digest

from disagg.base.errors import TransferError
from disagg.base.ids import BlockId
from disagg.transfer.pool import Blocks

DIGEST_BYTES: Final = 8


def block_digest(blocks: Blocks, block: int) -> bytes:
    """Return the digest of one block of a pool, viewed as ``[layer, block, words]``."""
    return xxh3_64_digest(b"".join([xxh3_64_digest(layer[block]) for layer in blocks]))


def join_digests(blocks: Blocks, wanted: Iterable[BlockId]) -> bytes:
    """Return the digests of these blocks, one after the other."""
    return b"".join([block_digest(blocks, block) for block in wanted])


class LayerDigests:
    """Digests of blocks whose layers come one after the other."""

    def __init__(self, num_blocks: int) -> None:
        self._of_layers: list[list[bytes]] = [[] for _ in range(num_blocks)]

    def add(self, layers: Blocks, wanted: Sequence[int]) -> None:
        """Take account of the next layers of the blocks, which are at these places of ``[layer, place, words]``."""
        for found, place in zip(self._of_layers, wanted, strict=True):
            found += [xxh3_64_digest(layer[place]) for layer in layers]

    def join(self) -> bytes:
        """Return the blocks' digests, one after the other."""
        return b"".join([xxh3_64_digest(b"".join(found)) for found in self._of_layers])


def split_digests(digests: bytes, num_blocks: int) -> Sequence[bytes]:
    """Return each block's digest, or none when there are none; raise TransferError for another number of them."""
    if len(digests) not in (0, num_blocks * DIGEST_BYTES):
        raise TransferError(f"{len(digests)} bytes are not the digests of {num_blocks} blocks")
    return [digests[start : start + DIGEST_BYTES] for start in range(0, len(digests), DIGEST_BYTES)]


def bad_blocks(blocks: Blocks, wanted: Sequence[int], digests: Sequence[bytes]) -> list[int]:
    """Return the places in ``wanted`` of those blocks whose digest is another one. Without digests nothing is bad."""
    if not digests:
        return []
    return [index for index, block in enumerate(wanted) if block_digest(blocks, block) != digests[index]]


def corrupt(block: int) -> TransferError:
    """Return the error for a block of the peer that came with another digest twice."""
    return TransferError(f"KV block {block} of the peer came twice with another digest than it was offered with")
