"""Names of KV prefixes: a chained digest over the tokens of each full block.

Computed once at the edge and carried with the request, so that policy code never sees token values. The digest of a
block covers all tokens before it; equal digests mean equal prefixes. It is keyed by nothing but its input: the same
in every process and on every host (unlike Python's ``hash``).
"""

import hashlib
from array import array
from collections.abc import Sequence
from typing import Final

from disagg.base.ids import BlockHash

DIGEST_BYTES: Final = 16


def hash_blocks(token_ids: Sequence[int], block_size: int, salt: bytes = b"") -> tuple[BlockHash, ...]:
    """Return one digest for each full block of ``block_size`` tokens; a partial last block has none.

    ``salt`` separates tenants or models whose KV must never be shared. Token ids must fit 32 bits.
    """
    data = memoryview(array("I", token_ids).tobytes())
    stride = block_size * array("I").itemsize
    digests: list[BlockHash] = []
    previous = salt
    for start in range(0, len(data) - stride + 1, stride):
        digest = hashlib.blake2b(previous, digest_size=DIGEST_BYTES)
        digest.update(data[start : start + stride])
        previous = digest.digest()
        digests.append(BlockHash(previous))
    return tuple(digests)
