"""Copy plans between instances of unequal tensor and pipeline parallelism: every pair of 1, 2 and 4 on either side."""

from collections import Counter
from itertools import product

import pytest

from disagg.base.errors import ConfigurationError
from disagg.cache.copy_plan import KvShare, Rank, Sharding, ShareCopy, plan_copies

SIZES = (1, 2, 4)
SHAPES = list(product(SIZES, SIZES))
MODELS = [(30, 8), (7, 4), (5, 2), (4, 1)]
"""Layers, which four stages seldom divide, and KV heads, of which there may be fewer than tensor ranks."""


@pytest.mark.parametrize("model", MODELS, ids=str)
@pytest.mark.parametrize("source", SHAPES, ids=str)
@pytest.mark.parametrize("target", SHAPES, ids=str)
def test_every_reader_gets_all_that_it_holds_once_from_who_has_it(
    model: tuple[int, int], source: tuple[int, int], target: tuple[int, int]
) -> None:
    theirs, ours = Sharding(*model, *source), Sharding(*model, *target)
    plan = plan_copies(theirs, ours)
    for reader in ours.ranks:
        got: Counter[tuple[int, int]] = Counter()
        for copy in plan:
            if copy.target == reader:
                held = theirs.share(copy.source)
                assert set(copy.share.layers) <= set(held.layers)
                assert set(copy.share.heads) <= set(held.heads)
                got.update(product(copy.share.layers, copy.share.heads))
        wanted = ours.share(reader)
        assert got == Counter(product(wanted.layers, wanted.heads))


@pytest.mark.parametrize("model", MODELS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_devices_together_hold_the_model(model: tuple[int, int], shape: tuple[int, int]) -> None:
    sharding = Sharding(*model, *shape)
    shares = [sharding.share(rank) for rank in sharding.ranks]
    held = {pair for share in shares for pair in product(share.layers, share.heads)}
    assert held == set(product(range(model[0]), range(model[1])))
    sizes = {len(share.layers) for share in shares}
    assert max(sizes) - min(sizes) <= 1


def test_equal_instances_copy_from_rank_to_rank() -> None:
    sharding = Sharding(4, 4, 2, 2)
    assert [(copy.source, copy.target) for copy in plan_copies(sharding, sharding)] == [
        (rank, rank) for rank in sharding.ranks
    ]


def test_two_heads_on_one_device_come_from_two() -> None:
    plan = plan_copies(Sharding(2, 2, 2, 1), Sharding(2, 2, 1, 2))
    assert plan == tuple(
        ShareCopy(Rank(0, tensor), Rank(stage, 0), KvShare(range(stage, stage + 1), range(tensor, tensor + 1)))
        for stage in range(2)
        for tensor in range(2)
    )


def test_owners_of_the_same_head_take_turns() -> None:
    plan = plan_copies(Sharding(1, 1, 4, 1), Sharding(1, 1, 4, 1))
    assert [copy.source.tensor for copy in plan] == [0, 1, 2, 3]


def test_what_cannot_be_shared_out_or_is_another_model_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="3 KV heads cannot be shared out to 2 tensor ranks"):
        Sharding(30, 3, 2)
    with pytest.raises(ConfigurationError, match="2 layers cannot be shared out to 4 stages"):
        Sharding(2, 8, 1, 4)
    with pytest.raises(ConfigurationError, match="num_layers differ: the source has 30, the reader 28"):
        plan_copies(Sharding(30, 8), Sharding(28, 8))
