from hypothesis import given
from hypothesis import strategies as st

from disagg.base.block_hash import first_link, hash_blocks, names_for

tokens = st.lists(st.integers(0, 2**32 - 1), max_size=70)


@given(prefix=tokens, left=tokens, right=tokens)
def test_equal_prefixes_have_equal_names_and_only_they(prefix: list[int], left: list[int], right: list[int]) -> None:
    ours, theirs = hash_blocks(prefix + left, 8), hash_blocks(prefix + right, 8)
    for index, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        end = (index + 1) * 8
        assert (one == other) == ((prefix + left)[:end] == (prefix + right)[:end])


@given(prefix=tokens, left=tokens, right=tokens)
def test_names_of_larger_blocks_are_among_those_of_smaller_ones(
    prefix: list[int], left: list[int], right: list[int]
) -> None:
    ours, theirs = (names_for(hash_blocks(prefix + rest, 4), 4, 12) for rest in (left, right))
    assert len(ours) == len(prefix + left) // 12
    for index, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        end = (index + 1) * 12
        assert (one == other) == ((prefix + left)[:end] == (prefix + right)[:end])


def test_blocks_of_other_sizes_have_no_names() -> None:
    names = hash_blocks(range(24), 4)
    assert names_for(names, 4, 4) == names
    assert names_for(names, 4, 6) == names_for(names, 4, 2) == names_for((), 0, 4) == ()


def test_a_partial_block_has_no_name() -> None:
    assert hash_blocks([1, 2, 3], 4) == ()
    assert len(hash_blocks([1, 2, 3, 4, 5], 4)) == 1


def test_the_name_is_the_same_in_every_process() -> None:
    assert hash_blocks([1, 2], 2)[0].hex() == "2cc5e4d47c5f3c5fbe635a5a5b7bb392"


def test_a_salt_separates() -> None:
    assert hash_blocks([1, 2], 2) != hash_blocks([1, 2], 2, first_link("tenant"))
