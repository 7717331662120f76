"""Which blocks are on disk: bounded, the least recently used one goes first."""

from disagg.base.ids import BlockHash
from disagg.base.kv_events import Medium
from disagg.cache.block_tier import BlockTier

NAMES = tuple(BlockHash(bytes([number])) for number in range(6))


def save(tier: BlockTier, name: BlockHash) -> tuple[BlockHash, ...]:
    dropped = tier.begin_save(name)
    tier.end_save(name, is_there=True)
    return dropped


def test_the_least_recently_used_block_makes_room() -> None:
    tier = BlockTier(Medium.DISK, 3, NAMES[:3])
    tier.touch(NAMES[:1])
    assert save(tier, NAMES[3]) == (NAMES[1],)
    assert set(tier.names) == {NAMES[0], NAMES[2], NAMES[3]}


def test_of_blocks_used_together_the_last_goes_first() -> None:
    tier = BlockTier(Medium.DISK, 4, NAMES[:4])
    tier.touch(NAMES[:3])
    assert [save(tier, name) for name in NAMES[4:]] == [(NAMES[3],), (NAMES[2],)]


def test_what_could_not_be_written_is_not_there_and_may_be_tried_again() -> None:
    tier = BlockTier(Medium.DISK, 2)
    tier.begin_save(NAMES[0])
    assert not tier.lacks(NAMES[0])
    tier.end_save(NAMES[0], is_there=False)
    assert tier.lacks(NAMES[0])
    assert len(tier) == 0
