"""The router's index of who holds which prefixes, against a plain model of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg.base.errors import InternalError
from disagg.base.ids import BlockHash, InstanceId
from disagg.base.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, Medium
from disagg.cache.prefix_index import HeldPrefix, PrefixIndex

A, B = InstanceId("a"), InstanceId("b")
NAMES = tuple(BlockHash(bytes([number])) for number in range(6))
SIZE = 16


def stored(*names: BlockHash, medium: Medium = Medium.CPU) -> BlockStored:
    return BlockStored(names, None, (), SIZE, None, medium)


@pytest.fixture
def index() -> PrefixIndex:
    index = PrefixIndex()
    for instance in (A, B):
        index.join(instance, SIZE, max_blocks=8)
    return index


def test_a_prefix_is_held_as_far_as_it_has_no_gap(index: PrefixIndex) -> None:
    assert index.take(A, 0, (stored(*NAMES[:3]), stored(NAMES[4])))
    assert index.take(B, 0, (stored(NAMES[0]), BlockRemoved((NAMES[0],), Medium.CPU), stored(NAMES[1])))
    assert index.find(NAMES, SIZE) == {A: HeldPrefix(3 * SIZE, 3 * SIZE)}
    assert index.find(NAMES[:2], SIZE) == {A: HeldPrefix(2 * SIZE, 2 * SIZE)}
    assert index.find((), SIZE) == {}


def test_blocks_on_disk_are_held_but_not_lent(index: PrefixIndex) -> None:
    index.take(A, 0, (stored(NAMES[0], NAMES[2]), stored(NAMES[0], NAMES[1], medium=Medium.DISK)))
    assert index.find(NAMES, SIZE) == {A: HeldPrefix(3 * SIZE, SIZE)}


def test_blocks_in_host_memory_alone_are_held_but_not_lent(index: PrefixIndex) -> None:
    index.join(A, SIZE, max_blocks=8, has_host_tier=True)
    index.take(A, 0, (stored(*NAMES[:2]), stored(NAMES[2], medium=Medium.GPU)))
    assert index.find(NAMES, SIZE) == {A: HeldPrefix(3 * SIZE, 0)}


def test_a_lost_message_makes_the_index_ask_once_and_believe_nothing_until_told_all(index: PrefixIndex) -> None:
    index.take(A, 0, (stored(NAMES[0]),))
    assert not index.take(A, 2, (stored(NAMES[1]),))
    assert index.find(NAMES, SIZE) == {}
    assert index.take(A, 3, (stored(NAMES[0]),))
    assert index.find(NAMES, SIZE) == {}
    assert index.take(A, 4, (AllBlocksCleared(), stored(*NAMES[:2])))
    assert index.find(NAMES, SIZE) == {A: HeldPrefix(2 * SIZE, 2 * SIZE)}


def test_an_instance_that_leaves_takes_its_blocks_along(index: PrefixIndex) -> None:
    index.take(A, 0, (stored(*NAMES),))
    index.take(B, 0, (stored(NAMES[0]),))
    index.leave(A)
    assert index.find(NAMES, SIZE) == {B: HeldPrefix(SIZE, SIZE)}
    index.join(A, SIZE, max_blocks=8)
    assert index.find(NAMES, SIZE) == {B: HeldPrefix(SIZE, SIZE)}
    assert len(index) == 1


def test_those_that_come_after_others_have_left_are_told_apart(index: PrefixIndex) -> None:
    index.take(B, 0, (stored(NAMES[0]),))
    index.leave(A)
    late = [InstanceId(f"late-{number}") for number in range(3)]
    for length, name in enumerate(late, start=2):
        index.join(name, SIZE, max_blocks=8)
        index.take(name, 0, (stored(*NAMES[:length]),))
    held = {B: 1, **{name: length for length, name in enumerate(late, start=2)}}
    assert index.find(NAMES, SIZE) == {name: HeldPrefix(length * SIZE, length * SIZE) for name, length in held.items()}


def test_blocks_of_twice_the_size_have_every_second_name() -> None:
    """Names of 16-token blocks: what A calls the second of them, B calls its first."""
    index = PrefixIndex()
    index.join(A, SIZE, max_blocks=8)
    index.join(B, 2 * SIZE, max_blocks=8)
    index.take(A, 0, (stored(*NAMES[:5]),))
    index.take(B, 0, (stored(NAMES[1], NAMES[3]),))
    assert index.find(NAMES, SIZE) == {A: HeldPrefix(5 * SIZE, 5 * SIZE), B: HeldPrefix(4 * SIZE, 4 * SIZE)}
    assert index.find(NAMES[1:], SIZE) == {A: HeldPrefix(4 * SIZE, 4 * SIZE)}, "of B's blocks none begins there"
    assert index.find(NAMES[1::2], 2 * SIZE) == {B: HeldPrefix(4 * SIZE, 4 * SIZE)}


def test_nothing_is_found_where_blocks_are_smaller_than_those_that_are_named(index: PrefixIndex) -> None:
    index.take(A, 0, (stored(*NAMES),))
    assert index.find(NAMES, 2 * SIZE) == {}
    assert index.find(NAMES, 24) == {}


def test_an_instance_cannot_hold_more_than_it_has_room_for(index: PrefixIndex) -> None:
    many = tuple(BlockHash(bytes([1, number])) for number in range(9))
    with pytest.raises(InternalError, match="holds more than the 8 blocks"):
        index.take(A, 0, (stored(*many),))


MEDIA = (Medium.GPU, Medium.CPU, Medium.DISK)
EVENTS = st.one_of(
    st.builds(
        lambda names, medium: stored(*names, medium=medium),
        st.lists(st.sampled_from(NAMES), max_size=4),
        st.sampled_from(MEDIA),
    ),
    st.builds(
        lambda names, medium: BlockRemoved(tuple(names), medium),
        st.lists(st.sampled_from(NAMES), max_size=4),
        st.sampled_from(MEDIA),
    ),
    st.just(AllBlocksCleared()),
)


@given(st.lists(st.tuples(st.sampled_from((A, B)), EVENTS), max_size=30))
def test_the_index_is_what_the_events_say(story: list) -> None:
    index = PrefixIndex()
    held: dict[InstanceId, dict[Medium, set[BlockHash]]] = {}
    numbers = dict.fromkeys((A, B), 0)
    for instance in (A, B):
        index.join(instance, SIZE, max_blocks=100, has_host_tier=True)
        held[instance] = {medium: set() for medium in MEDIA}
    for instance, event in story:
        assert index.take(instance, numbers[instance], (event,))
        numbers[instance] += 1
        if isinstance(event, AllBlocksCleared):
            held[instance] = {medium: set() for medium in MEDIA}
            continue
        names = held[instance][event.medium]
        (names.update if isinstance(event, BlockStored) else names.difference_update)(event.block_hashes)
    expected = {}
    for instance, by_medium in held.items():
        somewhere = set().union(*by_medium.values())
        lengths = [
            next((count for count, name in enumerate(NAMES) if name not in names), len(NAMES)) * SIZE
            for names in (somewhere, by_medium[Medium.GPU])
        ]
        if lengths[0]:
            expected[instance] = HeldPrefix(*lengths)
    assert index.find(NAMES, SIZE) == expected
    assert len(index) == sum(len(names) for by_medium in held.values() for names in by_medium.values())
