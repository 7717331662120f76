"""Blocks of one form made into blocks of another: element by element, in compiled code and without, over each link."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import product

import numpy as np
import pytest
from link_contract import DEADLINE_S, Ended, grant_all, pairs
from msgspec import structs

from disagg.base.clock import MonotonicClock
from disagg.base.errors import TransferError
from disagg.base.ids import BlockId
from disagg.base.transfer_settings import KvLinkChoice, KvTransferDtype, TransferSettings
from disagg.cache.layout import KvDtype, KvFormat, KvLayout
from disagg.costs.links import KvCodec
from disagg.transfer.block_forms import BlockForms
from disagg.transfer.digests import join_digests
from disagg.transfer.element_types import from_float, to_float
from disagg.transfer.link import KvRead, Transfer, TransferState
from disagg.transfer.links import Links, SharedBlocks
from disagg.transfer.pool import KvPool

FORMS = [
    (dtype, kv_format) for dtype, kv_format in product((KvDtype.FLOAT32, KvDtype.BFLOAT16, KvDtype.FLOAT16), KvFormat)
]
LAYERS, HEADS, SIZE, DIM = 2, 3, 4, 6


def layout(dtype: KvDtype, kv_format: KvFormat, num_blocks: int = 5) -> KvLayout:
    return KvLayout(
        num_layers=LAYERS,
        num_blocks=num_blocks,
        num_kv_heads=HEADS,
        block_size=SIZE,
        head_dim=DIM,
        dtype=dtype,
        format=kv_format,
    )


def place(one: KvLayout, kind: int, head: int, token: int, channel: int) -> int:
    """Index of an element in a layer of a block, by the words of ``KvFormat``."""
    start = (kind * HEADS + head) * SIZE * DIM
    w = 4 // one.dtype.itemsize
    if one.format is KvFormat.TOKEN_MAJOR:
        return start + token * DIM + channel
    if kind == 0:
        return start + (channel // w * SIZE + token) * w + channel % w
    return start + (token // w * DIM + channel) * w + token % w


def value(kind: int, head: int, token: int, channel: int) -> float:
    """A number for each element that every type holds exactly."""
    return float((((kind * HEADS + head) * SIZE + token) * DIM + channel) % 128)


def filled(one: KvLayout) -> np.ndarray:
    """The bytes of one layer of one block that holds those numbers."""
    values = np.zeros(2 * HEADS * SIZE * DIM, np.float32)
    for where in product(range(2), range(HEADS), range(SIZE), range(DIM)):
        values[place(one, *where)] = value(*where)
    return from_float(values, one.dtype)


@pytest.mark.parametrize("native", [True, False], ids=["native", "numpy"])
@pytest.mark.parametrize("source", FORMS, ids=str)
@pytest.mark.parametrize("target", FORMS, ids=str)
def test_every_element_comes_to_its_place(
    source: tuple[KvDtype, KvFormat], target: tuple[KvDtype, KvFormat], native: bool
) -> None:
    theirs, ours = layout(*source), layout(*target)
    forms = BlockForms(theirs, ours, native=native)
    if native and not forms.is_native:
        pytest.skip("there is no compiled code for these forms")
    pool = memoryview(bytearray(ours.total_bytes))
    came = memoryview(bytearray(filled(theirs).tobytes()))
    forms.convert(came, [0, 0], pool, range(1, 2), [BlockId(4), BlockId(1)])
    for block in (4, 1):
        found = np.frombuffer(pool, np.uint8, ours.layer_block_bytes, ours.offset(1, block))
        assert np.array_equal(found, filled(ours))
    assert not any(pool[: ours.layer_bytes])


@pytest.mark.parametrize("dtype", KvDtype)
@pytest.mark.parametrize("source", FORMS, ids=str)
def test_compiled_code_rounds_as_numpy_does(source: tuple[KvDtype, KvFormat], dtype: KvDtype) -> None:
    theirs, ours = layout(*source), layout(dtype, KvFormat.INTERLEAVED)
    values = np.random.default_rng(1).standard_normal(theirs.layer_block_bytes // theirs.dtype.itemsize, np.float32)
    came = memoryview(bytearray(from_float(values, theirs.dtype).tobytes()))
    found = []
    for native in (True, False):
        pool = memoryview(bytearray(ours.total_bytes))
        BlockForms(theirs, ours, native=native).convert(came, [0], pool, range(1), [BlockId(0)])
        found.append(bytes(pool))
    assert found[0] == found[1]


def converted(raw: np.ndarray, source: KvDtype, target: KvDtype, *, native: bool) -> np.ndarray:
    """Those elements, of which a block has any number, as compiled code or NumPy makes them another type."""
    size = -(-raw.size // (2 * DIM * source.itemsize)) + 1 & ~1
    plain = structs.replace(layout(source, KvFormat.TOKEN_MAJOR, 1), num_layers=1, num_kv_heads=1, block_size=size)
    theirs, ours = (structs.replace(plain, dtype=dtype) for dtype in (source, target))
    came = bytearray(theirs.total_bytes)
    came[: raw.size] = raw.tobytes()
    pool = memoryview(bytearray(ours.total_bytes))
    forms = BlockForms(theirs, ours, native=native)
    if native and not forms.is_native:
        pytest.skip("there is no compiled code")
    forms.convert(memoryview(came), [0], pool, range(1), [BlockId(0)])
    return np.frombuffer(pool, np.uint8)


def test_every_number_of_float16_is_the_same_in_compiled_code_and_in_numpy() -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    numbers = every[~np.isnan(every.view(np.float16))]
    wide = converted(numbers.view(np.uint8), KvDtype.FLOAT16, KvDtype.FLOAT32, native=True)
    assert np.array_equal(wide, converted(numbers.view(np.uint8), KvDtype.FLOAT16, KvDtype.FLOAT32, native=False))
    back = converted(wide, KvDtype.FLOAT32, KvDtype.FLOAT16, native=True)
    assert np.array_equal(back[: 2 * numbers.size].view(np.uint16), numbers)


def test_what_lies_between_two_numbers_of_float16_is_rounded_to_the_even_one() -> None:
    every = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middle = (every[:-1] + every[1:]) / 2
    beyond = np.array([65519.996, 65520.0, 65536.0, 1e30, np.inf, 1e-8, 2.0**-25, 1e-40], np.float32)
    near = [np.nextafter(middle, np.float32(side)) for side in (-np.inf, np.inf)]
    numbers = np.concatenate([every, middle, *near, beyond])
    raw = np.concatenate([numbers, -numbers]).view(np.uint8)
    expected = converted(raw, KvDtype.FLOAT32, KvDtype.FLOAT16, native=False)
    assert np.array_equal(converted(raw, KvDtype.FLOAT32, KvDtype.FLOAT16, native=True), expected)


def test_what_is_no_number_stays_none() -> None:
    raw = np.array([np.nan, -np.nan], np.float32).view(np.uint8)
    half = converted(raw, KvDtype.FLOAT32, KvDtype.FLOAT16, native=True)
    assert np.isnan(half[:4].view(np.float16)).all()
    assert np.isnan(converted(half, KvDtype.FLOAT16, KvDtype.FLOAT32, native=True)[:8].view(np.float32)).all()


@pytest.mark.parametrize(
    "change",
    [{"block_size": 6}, {"num_kv_heads": 2}, {"num_layers": 3}, {"num_window_layers": 2, "window": 9}],
    ids=str,
)
def test_what_differs_in_more_than_form_is_refused_in_words(change: dict[str, int]) -> None:
    ours = layout(KvDtype.FLOAT32, KvFormat.TOKEN_MAJOR)
    theirs = KvLayout(**{**{name: getattr(ours, name) for name in ours.__struct_fields__}, **change})
    with pytest.raises(TransferError, match=f"differ in {next(iter(change))}"):
        BlockForms(theirs, ours)


def test_blocks_of_another_size_are_refused_with_the_reason() -> None:
    ours = layout(KvDtype.FLOAT32, KvFormat.TOKEN_MAJOR)
    with pytest.raises(TransferError, match="of 6 and of 4 tokens: the larger must be a multiple of the smaller"):
        BlockForms(structs.replace(ours, block_size=6), ours)
    sliding = structs.replace(ours, num_window_layers=2, window=9)
    with pytest.raises(TransferError, match="of 8 and of 4 tokens of a model with sliding windows"):
        BlockForms(structs.replace(sliding, block_size=8), sliding)


LINKS = [
    (KvLinkChoice.SHM, KvTransferDtype.INT8),  # which reads them as they are
    (KvLinkChoice.TCP, KvTransferDtype.RAW),
    (KvLinkChoice.TCP, KvTransferDtype.INT8),
]


@pytest.fixture(params=LINKS, ids=lambda link: f"{link[0].value}-{link[1].value}")
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[KvPool, KvPool, Links, SharedBlocks]]:
    """A pool in bfloat16, interleaved, the reader's in float32, token-major, and how the one reads the other."""
    kv_link, form = request.param
    with ExitStack() as stack:
        peer = KvPool(layout(KvDtype.BFLOAT16, KvFormat.INTERLEAVED), "aa")
        stack.callback(peer.close)
        pool = KvPool(layout(KvDtype.FLOAT32, KvFormat.TOKEN_MAJOR, num_blocks=7), "bb")
        stack.callback(pool.close)
        settings = TransferSettings(kv_link=kv_link, kv_transfer_dtype=form)
        shared = SharedBlocks(peer, settings, None, MonotonicClock(), stack)
        links = Links(pool, stack.enter_context(ThreadPoolExecutor(1)), MonotonicClock(), settings)
        stack.callback(links.close)
        yield peer, pool, links, shared


def read(ends: tuple[KvPool, KvPool, Links, SharedBlocks], digests: bytes) -> Transfer:
    peer, _, links, shared = ends
    ended = Ended()
    access = grant_all(shared, peer.layout, DEADLINE_S)
    links.open(shared.address).read(KvRead(pairs((3, 6), (0, 2)), range(LAYERS), digests, access), ended)
    return ended.wait()


def test_a_pull_between_unequal_pools_converts_and_checks_what_was_offered(
    ends: tuple[KvPool, KvPool, Links, SharedBlocks],
) -> None:
    peer, pool, links, shared = ends
    raw = np.frombuffer(peer.data, np.uint8).reshape(LAYERS, peer.layout.num_blocks, -1)
    raw[:] = filled(peer.layout)
    offered = join_digests(peer.blocks, [BlockId(3), BlockId(0)])
    transfer = read(ends, offered)
    assert (transfer.state, transfer.num_bytes) == (TransferState.DONE, 2 * pool.layout.block_bytes), transfer.failure
    found = np.frombuffer(pool.data, np.float32).reshape(LAYERS, pool.layout.num_blocks, -1)
    expected = filled(pool.layout).view(np.float32)
    for block in (6, 2):
        if transfer.codec is KvCodec.INT8:  # half a step of a scale is lost
            assert np.abs(found[:, block] - expected).max() <= 0.5
            assert not np.array_equal(found[0, block], expected)
        else:
            assert all(np.array_equal(found[layer, block], expected) for layer in range(LAYERS))
    assert "converted from bfloat16 interleaved to float32 token_major" in links.why(shared.address)

    raw[1, 0, 5] ^= 1
    transfer = read(ends, offered)
    assert transfer.state is TransferState.FAILED
    assert "KV block 0 of the peer came twice with another digest" in transfer.failure


def test_elements_of_two_bytes_come_back_as_they_were() -> None:
    values = np.random.default_rng(2).standard_normal(64, np.float32)
    for dtype in (KvDtype.BFLOAT16, KvDtype.FLOAT16):
        raw = from_float(values, dtype)
        assert np.array_equal(from_float(to_float(raw, dtype), dtype), raw)
