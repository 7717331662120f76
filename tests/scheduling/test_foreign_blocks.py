"""Offers of blocks of another size: which own blocks they are, and which pieces of them fill those."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg.base.ids import BlockId, Epoch, InstanceId, RequestId
from disagg.base.messages import KvOffer
from disagg.scheduling.instance.foreign_blocks import in_own_blocks, pieces
from disagg.scheduling.step.actions import BlockCopy

SIZES = st.sampled_from([(2, 8), (8, 2), (4, 8), (8, 4), (4, 12), (12, 4), (6, 6)])


def offer(num_tokens: int, size: int, first_block: int = 0, **changes: Any) -> KvOffer:
    """Blocks 100, 101, ... of a source, up to the one that holds the last token."""
    fields = {
        "request_id": RequestId("a"),
        "epoch": Epoch(1),
        "source": InstanceId("prefill-0"),
        "incarnation": "1",
        "num_tokens": num_tokens,
        "block_size": size,
        "block_ids": tuple(BlockId(100 + number) for number in range(first_block, -(-num_tokens // size))),
        "lease_s": 60.0,
        "pool": b"",
        "first_block": first_block,
    }
    return KvOffer(**{**fields, **changes})


def tokens_of(copies: tuple[BlockCopy, ...], theirs: int, ours: int) -> dict[tuple[BlockId, int], tuple[BlockId, int]]:
    """Which place of the source each place of the own pool is filled from: (block, token inside)."""
    count = min(theirs, ours)
    found = {}
    for copy in copies:
        source, target = (copy.part * count if size > count else 0 for size in (theirs, ours))
        for token in range(count):
            place = (copy.target, target + token)
            assert place not in found, "written twice"
            found[place] = (copy.source, source + token)
    return found


@given(sizes=SIZES, num_tokens=st.integers(1, 60), num_here=st.integers(0, 60))
def test_the_pieces_of_a_whole_offer_are_every_token_that_is_not_here(
    sizes: tuple[int, int], num_tokens: int, num_here: int
) -> None:
    theirs, ours = sizes
    whole = offer(num_tokens, theirs)
    own = in_own_blocks(whole, ours)
    assert (own.first_block, own.num_tokens, len(own.block_ids)) == (0, num_tokens, -(-num_tokens // ours))
    first = min(num_here, num_tokens) // ours
    copies = tuple(BlockCopy(block, BlockId(number)) for number, block in enumerate(own.block_ids))[first:]
    found = tokens_of(pieces(whole, copies, ours), theirs, ours)
    for token in range(first * ours, num_tokens):
        block, inside = divmod(token, theirs)
        assert found[BlockId(token // ours), token % ours] == (100 + block, inside)


@given(sizes=SIZES, data=st.data())
def test_parts_bring_blocks_that_are_filled_and_never_one_that_an_earlier_part_began(
    sizes: tuple[int, int], data: st.DataObject
) -> None:
    theirs, ours = sizes
    first = data.draw(st.integers(0, 6))
    num_blocks = data.draw(st.integers(1, 8))
    part = offer((first + num_blocks) * theirs, theirs, first)
    own = in_own_blocks(part, ours, ends_open=True)
    copies = tuple(BlockCopy(block, BlockId(own.first_block + at)) for at, block in enumerate(own.block_ids))
    found = tokens_of(pieces(part, copies, ours), theirs, ours)
    whole_blocks = [
        block
        for block in range(100)
        if first * theirs <= block * ours and (block + 1) * ours <= (first + num_blocks) * theirs
    ]
    assert sorted(found) == [(block, token) for block in whole_blocks for token in range(ours)]
    for (block, inside), (source, source_inside) in found.items():
        assert (source - 100) * theirs + source_inside == block * ours + inside


@pytest.mark.parametrize(
    "unfit",
    [
        offer(40, 6, block_size=6),
        offer(40, 16, block_ids=(BlockId(1), BlockId(2))),
        offer(40, 16, block_ids=tuple(map(BlockId, range(5)))),
    ],
    ids=["no multiple", "too few", "too many"],
)
def test_what_cannot_be_made_into_own_blocks_is_an_offer_of_none(unfit: KvOffer) -> None:
    """The scheduler finds that it is not whole, and computes the sequence here."""
    assert in_own_blocks(unfit, 8).block_ids == ()
