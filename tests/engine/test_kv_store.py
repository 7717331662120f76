"""The KV store: on CPU the shared pool itself, on an accelerator a device copy with the pool as staging area."""

from collections.abc import Callable, Iterator

import pytest
import torch

from disagg.base.ids import BlockId
from disagg.cache.layout import KvDtype, KvFormat, KvLayout
from disagg.engine.kv_store import DeviceKvStore, KvStore, SharedKvStore, make_kv_store, pool_tensor
from disagg.transfer.page_toucher import PageToucher
from disagg.transfer.pool import KvPool


@pytest.fixture(params=[KvDtype.FLOAT32, KvDtype.BFLOAT16])
def pool(request: pytest.FixtureRequest) -> Iterator[KvPool]:
    layout = KvLayout(
        num_layers=3,
        num_blocks=6,
        num_kv_heads=2,
        block_size=4,
        head_dim=8,
        dtype=request.param,
        format=KvFormat.TOKEN_MAJOR,
    )
    pool = KvPool(layout, "0a")
    yield pool
    pool.close()


def on_device(pool: KvPool) -> KvStore:
    return DeviceKvStore(pool, torch.device("cpu"))  # the copies are the same on any device


def test_the_tensor_lies_where_the_layout_says(pool: KvPool) -> None:
    tensor = pool_tensor(pool)
    assert tensor.shape == (3, 6, 2, 2, 32)
    layer, block = 2, 5
    offset = tensor[layer, block].data_ptr() - tensor.data_ptr()
    assert offset == pool.layout.offset(layer, block)
    assert tensor.data_ptr() % 64 == 0


def test_on_cpu_the_pool_is_computed_on(pool: KvPool) -> None:
    store = make_kv_store(pool, torch.device("cpu"))
    assert isinstance(store, SharedKvStore)
    assert store.layers.data_ptr() == pool.blocks.ctypes.data


@pytest.mark.parametrize("make", [SharedKvStore, on_device])
def test_published_blocks_are_in_the_pool_and_received_ones_are_computed_on(
    pool: KvPool, make: Callable[[KvPool], KvStore]
) -> None:
    store = make(pool)
    staging = pool_tensor(pool)
    blocks = [BlockId(4), BlockId(1)]
    values = torch.randn(store.layers[:, blocks].shape).to(store.layers.dtype)
    store.layers[:, blocks] = values
    store.publish(blocks)
    assert torch.equal(staging[:, blocks], values)
    staging[:, 3] = values[:, 0]
    store.receive([BlockId(3)])
    assert torch.equal(store.layers[:, 3], values[:, 0])
    assert not store.layers[:, [0, 2, 5]].any()


def test_touching_the_pool_in_the_background_changes_nothing(pool: KvPool) -> None:
    pool.blocks[:] = 3
    toucher = PageToucher(pool)
    toucher.start()
    toucher.stop()
    assert (pool.blocks == 3).all()
