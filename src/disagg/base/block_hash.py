"""Names of KV prefixes: a chained digest over the tokens of each full block.

Those of a prompt are computed once at the edge and carried with the request, those of its answer where the answer is
sampled, so that policy code never sees token values. The digest of a
block covers all tokens before it; equal digests mean equal prefixes. It is keyed by nothing but its input: the same
in every process and on every host (unlike Python's ``hash``). So the name of a block is one for the larger block that
ends where it does, and a deployment with blocks of several sizes names those of the smallest.
"""

import hashlib
from array import array
from collections.abc import Sequence
from typing import Final

from disagg.base.ids import BlockHash

DIGEST_BYTES: Final = 16


def hash_blocks(token_ids: Sequence[int], block_size: int, after: bytes = b"") -> tuple[BlockHash, ...]:
    """Return one digest for each full block of ``block_size`` tokens; a partial last block has none.

    ``after`` is the digest of the block before the first one; at the start of a sequence, what ``first_link`` returns.
    Token ids must fit 32 bits.
    """
    data = memoryview(array("I", token_ids).tobytes())
    stride = block_size * array("I").itemsize
    digests: list[BlockHash] = []
    previous = after
    for start in range(0, len(data) - stride + 1, stride):
        digest = hashlib.blake2b(previous, digest_size=DIGEST_BYTES)
        digest.update(data[start : start + stride])
        previous = digest.digest()
        digests.append(BlockHash(previous))
    return tuple(digests)


def names_for(names: Sequence[BlockHash], hash_block_size: int, block_size: int) -> tuple[BlockHash, ...]:
    """Return the names of a sequence's blocks of ``block_size``, given those of its blocks of ``hash_block_size``.

    None where the one is no multiple of the other: such blocks are not found again.
    """
    if hash_block_size == block_size:
        return tuple(names)
    if not hash_block_size or block_size % hash_block_size:
        return ()
    each = block_size // hash_block_size
    return tuple(names[each - 1 :: each])


def first_link(cache_salt: str) -> bytes:
    """Return what the digests of a sequence are chained to: sequences of another salt share no block with it.

    A digest of the salt, not the salt itself, so that no salt can pose as the digest of another sequence's block.
    """
    if not cache_salt:
        return b""
    return hashlib.blake2b(cache_salt.encode("utf-8", "surrogatepass"), digest_size=32, person=b"cache_salt").digest()
