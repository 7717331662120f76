"""Where an instance keeps the keys and values it computes with, and how they reach the pool that peers can read."""

from collections.abc import Sequence
from typing import Final, Protocol

import torch

from disagg.base.ids import BlockId
from disagg.cache.layout import KvDtype
from disagg.transfer.pool import KvPool

TORCH_DTYPES: Final = {
    KvDtype.FLOAT32: torch.float32,
    KvDtype.BFLOAT16: torch.bfloat16,
    KvDtype.FLOAT16: torch.float16,
}


class KvStore(Protocol):
    """Keys and values on the device that computes.

    ``layers`` [num_layers, num_blocks, 2, kv heads, block_size * head_dim] is what the decoder reads and writes.
    """

    layers: torch.Tensor

    def publish(self, blocks: Sequence[BlockId]) -> None:
        """Make blocks that were computed readable in the shared pool."""

    def receive(self, blocks: Sequence[BlockId]) -> None:
        """Take over blocks that were written into the shared pool."""


class SharedKvStore:
    """On CPU the shared pool itself is computed on: nothing has to be copied."""

    def __init__(self, pool: KvPool) -> None:
        self.layers = pool_tensor(pool)

    def publish(self, blocks: Sequence[BlockId]) -> None:
        """Do nothing: what was computed is in the pool."""

    def receive(self, blocks: Sequence[BlockId]) -> None:
        """Do nothing: what was pulled is where it is computed on."""


class DeviceKvStore:
    """On an accelerator the shared pool is a staging area of the same layout, block for block, in host memory.

    Its pages are taken when a block first passes through, so it costs as much memory as there was ever in transit.
    """

    def __init__(self, pool: KvPool, device: torch.device) -> None:
        self._staging = pool_tensor(pool)
        self.layers = torch.zeros_like(self._staging, device=device)

    def publish(self, blocks: Sequence[BlockId]) -> None:
        """Copy blocks from the device into the staging area, and wait until they are there."""
        index = torch.tensor(blocks)
        self._staging[:, index] = self.layers[:, index.to(self.layers.device)].cpu()

    def receive(self, blocks: Sequence[BlockId]) -> None:
        """Copy blocks from the staging area to the device; later steps see them."""
        index = torch.tensor(blocks)
        self.layers[:, index.to(self.layers.device)] = self._staging[:, index].to(self.layers.device)


def make_kv_store(pool: KvPool, device: torch.device) -> KvStore:
    """Return the store of one instance."""
    return SharedKvStore(pool) if device.type == "cpu" else DeviceKvStore(pool, device)


def pool_tensor(pool: KvPool) -> torch.Tensor:
    """View a pool as [num_layers, num_blocks, 2, kv heads, block_size * head_dim]."""
    layout = pool.layout
    flat = torch.frombuffer(pool.data, dtype=TORCH_DTYPES[layout.dtype])
    return flat.view(layout.num_layers, layout.num_blocks, 2, layout.num_kv_heads, layout.block_size * layout.head_dim)
