"""Coded blocks on a wire: block after block, each with the digest of its coded bytes where digests are checked.

The digest that a block was offered with is of its original bytes, which the reader never sees. So the source compares
it before it codes, and vouches for the coded bytes with another one; of a block that has changed it sends a wrong one.
"""

from collections.abc import Sequence

from xxhash import xxh3_64_digest

from disagg.base.ids import BlockId
from disagg.transfer.block_forms import ConvertedBlocks
from disagg.transfer.digests import DIGEST_BYTES, block_digest
from disagg.transfer.int8_codec import Int8Codec
from disagg.transfer.pool import KvPool
from disagg.transfer.source_blocks import SourceBlock


class CodedBlocks:
    """Codes groups of blocks of one pool, or takes them over into it.

    ``converted`` makes the pool's blocks of what was coded in another form; without it they have one form.
    """

    def __init__(self, pool: KvPool, layers: range, converted: ConvertedBlocks | None = None) -> None:
        self._pool = pool
        self._layers = layers
        self._converted = converted
        self._codec = Int8Codec(pool.layout if converted is None else converted.remote)
        self._block_bytes = self._codec.layer_bytes * len(layers)
        self._buffer = bytearray()

    def num_bytes(self, num_blocks: int, *, has_digests: bool) -> int:
        """Return how many bytes so many blocks have on the wire."""
        return num_blocks * (self._block_bytes + DIGEST_BYTES * has_digests)

    def encode(self, blocks: Sequence[BlockId], digests: Sequence[bytes]) -> memoryview:
        """Return a group's bytes; ``digests`` are those of the original blocks, or none. The next call reuses them."""
        coded = self.room_for(len(blocks), has_digests=bool(digests))
        self._codec.encode(self._pool.data, self._layers, blocks, coded)
        for index, digest in enumerate(digests):
            seal = xxh3_64_digest(self._block(coded, index))
            if block_digest(self._pool.blocks, blocks[index]) != digest:
                seal = bytes(byte ^ 0xFF for byte in seal)
            start = len(blocks) * self._block_bytes + index * DIGEST_BYTES
            coded[start : start + DIGEST_BYTES] = seal
        return coded

    def room_for(self, num_blocks: int, *, has_digests: bool) -> memoryview:
        """Return the memory for a group's bytes."""
        wanted = self.num_bytes(num_blocks, has_digests=has_digests)
        if len(self._buffer) < wanted:
            self._buffer = bytearray(wanted)
        return memoryview(self._buffer)[:wanted]

    def decode(self, coded: memoryview, blocks: Sequence[SourceBlock], *, has_digests: bool) -> list[int]:
        """Take a group over into the pool; return the places in ``blocks`` of those that came with a wrong digest."""
        if self._converted is None:
            self._codec.decode(coded, self._layers, [block.target for block in blocks], self._pool.data)
        else:
            self._decode_converted(self._converted, coded, blocks)
        if not has_digests:
            return []
        start = len(blocks) * self._block_bytes
        return [
            index
            for index in range(len(blocks))
            if xxh3_64_digest(self._block(coded, index)) != coded[start + index * DIGEST_BYTES :][:DIGEST_BYTES]
        ]

    def _decode_converted(self, converted: ConvertedBlocks, coded: memoryview, blocks: Sequence[SourceBlock]) -> None:
        room, size = converted.room_for(len(blocks)), converted.remote.layer_block_bytes
        # There layers lie one after the other, in coded bytes blocks.
        starts = [
            (layer * len(blocks) + index) * size for index in range(len(blocks)) for layer in range(len(self._layers))
        ]
        self._codec.decode_at(coded, starts, room)
        converted.take(room, blocks, ())

    def _block(self, coded: memoryview, index: int) -> memoryview:
        return coded[index * self._block_bytes : (index + 1) * self._block_bytes]
