"""Blocks as int8: bounded error, the same bits from compiled code and NumPy, and whole over a wire."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import pytest
from link_contract import DEADLINE_S, Ends, grant_all, pairs

from disagg.base.clock import MonotonicClock
from disagg.base.ids import BlockId
from disagg.base.transfer_settings import KvLinkChoice, KvTransferDtype, TransferSettings
from disagg.cache.layout import KvDtype, KvFormat, KvLayout
from disagg.costs.links import KvCodec
from disagg.transfer.digests import join_digests
from disagg.transfer.int8_codec import Int8Codec, ScaleOf
from disagg.transfer.link import TransferState
from disagg.transfer.links import Links, SharedBlocks
from disagg.transfer.pool import KvPool


def layout_of(dtype: KvDtype, kv_format: KvFormat, block_size: int = 32, head_dim: int = 64) -> KvLayout:
    return KvLayout(
        num_layers=2,
        num_blocks=6,
        num_kv_heads=3,
        block_size=block_size,
        head_dim=head_dim,
        dtype=dtype,
        format=kv_format,
    )


LAYOUTS = [layout_of(dtype, kv_format) for dtype in KvDtype for kv_format in KvFormat]
BLOCKS = [BlockId(block) for block in (4, 1, 2)]


def values(data: bytes | bytearray | memoryview, dtype: KvDtype) -> np.ndarray:
    if dtype is KvDtype.BFLOAT16:
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, np.float32 if dtype is KvDtype.FLOAT32 else np.float16).astype(np.float32)


def stored(numbers: np.ndarray, dtype: KvDtype) -> bytearray:
    if dtype is KvDtype.BFLOAT16:
        return bytearray((numbers.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes())
    return bytearray(numbers.astype(np.float32 if dtype is KvDtype.FLOAT32 else np.float16).tobytes())


def noise(layout: KvLayout) -> bytearray:
    count = layout.total_bytes // layout.dtype.itemsize
    generator = np.random.default_rng(5)
    return stored(generator.standard_normal(count) * np.exp(generator.standard_normal(count)), layout.dtype)


def there_and_back(codec: Int8Codec, layout: KvLayout, pool: bytearray) -> tuple[bytes, bytearray]:
    layers = range(layout.num_layers)
    coded = bytearray(codec.layer_bytes * len(BLOCKS) * len(layers))
    codec.encode(memoryview(pool), layers, BLOCKS, memoryview(coded))
    received = bytearray(len(pool))
    codec.decode(memoryview(coded), layers, BLOCKS, memoryview(received))
    return bytes(coded), received


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.describe())
def test_the_error_is_half_a_step_of_the_largest_value_that_shares_the_scale(layout: KvLayout) -> None:
    pool = noise(layout)
    _, received = there_and_back(Int8Codec(layout), layout, pool)
    for layer in range(layout.num_layers):
        for block in range(layout.num_blocks):
            start = layout.offset(layer, block)
            before = values(pool[start : start + layout.layer_block_bytes], layout.dtype)
            after = values(received[start : start + layout.layer_block_bytes], layout.dtype)
            if block not in BLOCKS:
                assert not after.any()
                continue
            step = np.abs(before).max() / 127
            assert np.abs(before - after).max() <= 0.5 * step + np.abs(before).max() * 2**-8
            assert np.abs(before - after).mean() < 0.25 * step


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.describe())
def test_a_channel_of_k_and_a_token_of_v_have_scales_of_their_own(layout: KvLayout) -> None:
    """One large channel of K, or token of V, leaves the others as exact as they were."""
    elements = layout.block_size * layout.head_dim
    lanes = 1 if layout.format is KvFormat.TOKEN_MAJOR else 4 // layout.dtype.itemsize
    numbers = np.ones(layout.total_bytes // layout.dtype.itemsize, np.float32)
    blocks = numbers.reshape(layout.num_layers, layout.num_blocks, 2, layout.num_kv_heads, elements)
    if layout.format is KvFormat.TOKEN_MAJOR:
        blocks.reshape(*blocks.shape[:-1], layout.block_size, layout.head_dim)[:, :, 0, :, :, 3] = 1000.0
        blocks.reshape(*blocks.shape[:-1], layout.block_size, layout.head_dim)[:, :, 1, :, 3, :] = 1000.0
    else:
        k = blocks.reshape(*blocks.shape[:-1], layout.head_dim // lanes, layout.block_size, lanes)
        k[:, :, 0, :, 1, :, lanes - 1] = 1000.0
        v = blocks.reshape(*blocks.shape[:-1], layout.block_size // lanes, layout.head_dim, lanes)
        v[:, :, 1, :, 1, :, lanes - 1] = 1000.0
    pool = stored(numbers, layout.dtype)
    _, received = there_and_back(Int8Codec(layout), layout, pool)
    start = layout.offset(0, BLOCKS[0])
    kept = values(received[start : start + layout.layer_block_bytes], layout.dtype)
    assert np.allclose(kept, values(pool[start : start + layout.layer_block_bytes], layout.dtype), rtol=2**-7)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.describe())
def test_compiled_code_and_numpy_give_the_same_bits(layout: KvLayout) -> None:
    native, portable = Int8Codec(layout), Int8Codec(layout, native=False)
    if not native.is_native:
        pytest.skip("there is no compiled code for this layout")
    pool = noise(layout)
    start = layout.offset(1, BLOCKS[1])
    pool[start : start + layout.layer_block_bytes] = bytes(layout.layer_block_bytes)  # a block of zeros
    coded, received = there_and_back(native, layout, pool)
    assert (coded, received) == there_and_back(portable, layout, pool)


def test_rows_that_are_no_multiple_of_32_are_coded_all_the_same() -> None:
    layout = layout_of(KvDtype.BFLOAT16, KvFormat.INTERLEAVED, block_size=6, head_dim=10)
    codec = Int8Codec(layout)
    assert not codec.is_native
    pool = noise(layout)
    assert there_and_back(codec, layout, pool)[1] != bytearray(len(pool))


def test_scales_that_the_order_of_elements_does_not_allow_are_refused() -> None:
    with pytest.raises(ValueError, match="no rows for scales of each token"):
        Int8Codec(layout_of(KvDtype.BFLOAT16, KvFormat.INTERLEAVED), key_scales=ScaleOf.TOKEN)


class TestOverTcp:
    layout = layout_of(KvDtype.FLOAT32, KvFormat.INTERLEAVED)

    @pytest.fixture
    def source(self) -> Iterator[KvPool]:
        pool = KvPool(self.layout, "aa")
        pool.data[:] = noise(self.layout)
        yield pool
        pool.close()

    @pytest.fixture
    def ends(self, source: KvPool) -> Iterator[Ends]:
        with ExitStack() as stack:
            shared = SharedBlocks(source, TransferSettings(kv_link=KvLinkChoice.TCP), None, MonotonicClock(), stack)
            pool = KvPool(self.layout, "cc")
            stack.callback(pool.close)
            threads = stack.enter_context(ThreadPoolExecutor(max_workers=1))
            settings = TransferSettings(kv_transfer_dtype=KvTransferDtype.INT8)
            links = Links(pool, threads, MonotonicClock(), settings)
            stack.callback(links.close)
            access = grant_all(shared, self.layout, DEADLINE_S)
            yield Ends(links.open(shared.address), pool, self.layout, lambda: None, access)

    @pytest.mark.parametrize("has_digests", [False, True])
    def test_blocks_arrive_as_the_codec_makes_them(self, ends: Ends, source: KvPool, has_digests: bool) -> None:
        digests = join_digests(source.blocks, BLOCKS) if has_digests else b""
        transfer = ends.read(pairs(*((block, block) for block in BLOCKS)), digests=digests)
        assert (transfer.state, transfer.codec) == (TransferState.DONE, KvCodec.INT8), transfer.failure
        _, expected = there_and_back(Int8Codec(self.layout), self.layout, bytearray(source.data))
        assert bytes(ends.pool.data) == bytes(expected)

    def test_a_block_that_changed_after_it_was_offered_is_never_taken(self, ends: Ends, source: KvPool) -> None:
        digests = join_digests(source.blocks, BLOCKS)
        source.blocks[1, BLOCKS[2], 7] += 1
        transfer = ends.read(pairs(*((block, block) for block in BLOCKS)), digests=digests)
        assert transfer.state is TransferState.FAILED
        assert f"KV block {BLOCKS[2]} of the peer came twice" in transfer.failure
