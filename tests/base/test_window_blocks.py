"""Which KV blocks the layers with a sliding window need: counted token by token."""

import pytest

from disagg.base.window_blocks import WindowBlocks

BLOCK_SIZE = 4


@pytest.mark.parametrize("window", [1, 4, 5, 9])
def test_the_first_seen_block_is_the_first_that_a_later_token_attends_to(window: int) -> None:
    for num_tokens in range(40):
        seen = [position for position in range(num_tokens + 1) if position > num_tokens - window]
        assert WindowBlocks(window, 1).first_seen(num_tokens, BLOCK_SIZE) == seen[0] // BLOCK_SIZE


@pytest.mark.parametrize("window", [1, 4, 5, 9])
@pytest.mark.parametrize("num_at_once", [1, 3, 16])
def test_no_more_blocks_are_in_sight_than_it_says(window: int, num_at_once: int) -> None:
    blocks, found = WindowBlocks(window, 1), []
    for num_tokens in range(40):
        last = -(-(num_tokens + num_at_once) // BLOCK_SIZE)
        found.append(last - blocks.first_seen(num_tokens, BLOCK_SIZE))
    assert max(found) == blocks.most_in_sight(num_at_once, BLOCK_SIZE)


@pytest.mark.parametrize("num_sequences", [1, 4])
def test_the_share_that_is_held_goes_from_all_to_what_sees_everything(num_sequences: int) -> None:
    blocks = WindowBlocks(1024, 5)
    shares = [blocks.held_share(num_sequences * length, num_sequences) for length in (1, 1024, 2048, 10**7)]
    assert shares == pytest.approx([1, 1, (1 + 5 / 2) / 6, 1 / 6], abs=1e-3)


@pytest.mark.parametrize("window", [1, 4, 5, 9])
def test_a_block_is_last_seen_just_before_the_window_has_passed_it(window: int) -> None:
    blocks = WindowBlocks(window, 1)
    for block in range(5):
        last = blocks.last_seen(block, BLOCK_SIZE)
        assert blocks.first_seen(last, BLOCK_SIZE) <= block < blocks.first_seen(last + 1, BLOCK_SIZE)
