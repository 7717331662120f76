"""Every block is in one state, and every hold that was taken is given back."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from disagg.base.errors import InternalError
from disagg.base.ids import BlockHash, BlockId
from disagg.cache.block_pool import BlockPool

A, B, C = (BlockHash(bytes([n])) for n in range(3))


def test_a_request_for_more_blocks_than_there_are_takes_none() -> None:
    pool = BlockPool(4)
    assert pool.allocate(5) is None
    assert pool.num_available == 4


def test_a_published_block_outlives_its_sequence_until_its_place_is_needed() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    assert blocks is not None
    pool.publish(blocks[0], A)
    pool.release(blocks)
    assert pool.match_prefix([A]) == blocks[:1]
    assert pool.audit().cached == 1
    pool.allocate(2)
    assert pool.match_prefix([A]) == ()


def test_eviction_takes_the_end_of_the_least_recently_used_prefix() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    assert blocks is not None
    for block, block_hash in zip(blocks, (A, B, C), strict=True):
        pool.publish(block, block_hash)
    pool.release(blocks)
    pool.allocate(1)
    assert pool.match_prefix([A, B, C]) == blocks[:2]


def test_the_blocks_of_a_sequence_lie_in_order_wherever_they_come_from() -> None:
    pool = BlockPool(8)
    first, second = pool.allocate(3), pool.allocate(3)
    assert first is not None
    assert second is not None
    for number, block in enumerate(second):
        pool.publish(block, BlockHash(bytes([number])))
    pool.release(second)
    pool.release(first)

    assert pool.allocate(8) == tuple(range(8))


def test_a_match_ends_at_the_first_unknown_block() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(2)
    assert blocks is not None
    pool.publish(blocks[0], A)
    pool.publish(blocks[1], C)
    assert pool.match_prefix([A, B, C]) == blocks[:1]


def test_a_retracted_block_is_found_no_more_and_free_when_let_go() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    assert blocks is not None
    pool.publish(blocks[0], A)
    pool.retract(blocks)
    assert pool.match_prefix([A]) == ()
    pool.release(blocks)
    assert pool.audit().free == 2
    pool.validate()


def test_a_block_shared_by_a_sequence_and_a_lease_is_freed_by_the_last_of_them() -> None:
    pool = BlockPool(1)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.publish(blocks[0], A)
    pool.acquire(blocks)
    pool.lease(blocks)
    assert pool.audit().active == 1
    pool.release(blocks)
    assert pool.audit().leased == 1
    assert pool.num_available == 0
    pool.end_lease(blocks)
    assert pool.num_available == 1


def test_a_quarantined_block_cannot_be_had() -> None:
    pool = BlockPool(1)
    blocks = pool.reserve(1)
    assert blocks is not None
    pool.quarantine(blocks)
    assert pool.allocate(1) is None
    pool.abandon(blocks)
    assert pool.allocate(1) == blocks


@pytest.mark.parametrize("move", ["commit", "quarantine", "end_lease", "acquire", "abandon"])
def test_an_illegal_move_says_what_the_block_is(move: str) -> None:
    pool = BlockPool(1)
    with pytest.raises(InternalError, match="block 0"):
        getattr(pool, move)([BlockId(0)])


class PoolMachine(RuleBasedStateMachine):
    """Any order of legal calls keeps the books right."""

    held = Bundle("held")
    leased = Bundle("leased")
    filling = Bundle("filling")
    quarantined = Bundle("quarantined")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12)

    @rule(target=held, count=st.integers(1, 4), prefix=st.integers(0, 3))
    def begin(self, count: int, prefix: int) -> tuple[BlockId, ...]:
        hashes = [BlockHash(bytes([prefix, n])) for n in range(count)]
        reusable = self.pool.match_prefix(hashes)
        missing = count - len(reusable)
        if missing > self.pool.num_available - self.pool.num_cached_among(reusable):
            return ()
        self.pool.acquire(reusable)
        fresh = self.pool.allocate(missing)
        assert fresh is not None
        for block, block_hash in zip(fresh, hashes[len(reusable) :], strict=True):
            self.pool.publish(block, block_hash)
        return reusable + fresh

    @rule(blocks=consumes(held))
    def fail(self, blocks: tuple[BlockId, ...]) -> None:
        self.pool.retract(blocks)
        self.pool.release(blocks)

    @rule(blocks=consumes(held))
    def release(self, blocks: tuple[BlockId, ...]) -> None:
        self.pool.release(blocks)

    @rule(target=leased, blocks=consumes(held))
    def lease(self, blocks: tuple[BlockId, ...]) -> tuple[BlockId, ...]:
        self.pool.lease(blocks)
        return blocks

    @rule(blocks=consumes(leased))
    def end_lease(self, blocks: tuple[BlockId, ...]) -> None:
        self.pool.end_lease(blocks)

    @rule(target=filling, count=st.integers(1, 4))
    def reserve(self, count: int) -> tuple[BlockId, ...]:
        return self.pool.reserve(count) or ()

    @rule(target=held, blocks=consumes(filling))
    def commit(self, blocks: tuple[BlockId, ...]) -> tuple[BlockId, ...]:
        self.pool.commit(blocks)
        return blocks

    @rule(target=quarantined, blocks=consumes(filling))
    def quarantine(self, blocks: tuple[BlockId, ...]) -> tuple[BlockId, ...]:
        self.pool.quarantine(blocks)
        return blocks

    @rule(blocks=consumes(quarantined))
    def end_quarantine(self, blocks: tuple[BlockId, ...]) -> None:
        self.pool.abandon(blocks)

    @invariant()
    def books_are_right(self) -> None:
        self.pool.validate()
        audit = self.pool.audit()
        assert audit.free + audit.cached == self.pool.num_available


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
