"""Offered blocks of another size than this instance's: as blocks of its own size, and back.

The step scheduler knows blocks of its own size alone. Of an offer whose blocks are smaller or larger it is told as many
of its own, named by their places in the sequence; what it wants to copy is then found in the offered blocks, piece by
piece of the smaller size. Digests, leases and capabilities stay those of the offered blocks.
"""

from msgspec import structs

from disagg.base.block_sizes import why_not_made
from disagg.base.ids import BlockId
from disagg.base.messages import KvOffer
from disagg.scheduling.step.actions import BlockCopy


def in_own_blocks(offer: KvOffer, block_size: int, *, ends_open: bool = False) -> KvOffer:
    """Return an offer as one of blocks of this size; of no block where none can be made of what is offered.

    With ``ends_open`` more of the sequence may follow: only blocks that are filled are of use. Those that are not, and
    one whose beginning was in an earlier part, are read once the whole is offered.
    """
    if offer.block_size == block_size:
        return offer
    start = offer.first_block * offer.block_size
    num_tokens = offer.num_tokens - offer.num_tokens % block_size if ends_open else offer.num_tokens
    first, end = -(-start // block_size), -(-num_tokens // block_size)
    is_all = len(offer.block_ids) == -(-offer.num_tokens // offer.block_size) - offer.first_block
    usable = is_all and not why_not_made(offer.block_size, block_size)
    places = tuple(map(BlockId, range(first, end))) if usable else ()
    return structs.replace(offer, block_ids=places, first_block=first, num_tokens=num_tokens, block_size=block_size)


def pieces(offer: KvOffer, copies: tuple[BlockCopy, ...], block_size: int) -> tuple[BlockCopy, ...]:
    """Return the copies of offered blocks that fill the targets of these, whose sources are ``in_own_blocks``."""
    if offer.block_size == block_size:
        return copies
    start = offer.first_block * offer.block_size
    count = min(offer.block_size, block_size)
    found = []
    for copy in copies:
        for inside in range(0, block_size, count):
            index, skipped = divmod(copy.source * block_size + inside - start, offer.block_size)
            if index < len(offer.block_ids):  # the last block need not be full
                found.append(BlockCopy(offer.block_ids[index], copy.target, (inside + skipped) // count))
    return tuple(found)
