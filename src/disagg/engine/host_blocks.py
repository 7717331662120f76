"""KV blocks in host memory, behind the pool of a device: one array, a place for each block."""

import mmap
from typing import Final

import numpy as np

from disagg.base.errors import ConfigurationError, TransferError
from disagg.base.ids import BlockHash
from disagg.base.units import format_bytes
from disagg.cache.layout import KvLayout
from disagg.engine.kv_tiers import BlockData


class HostBlocks:
    """Room for ``max_blocks``. Methods may be called from several threads, for different blocks.

    The memory is taken as it is written to. Raises ConfigurationError when the system refuses it.
    """

    place: Final = "host memory"

    def __init__(self, max_blocks: int, layout: KvLayout) -> None:
        try:
            memory = mmap.mmap(-1, max_blocks * layout.block_bytes)
        except OSError as error:
            size = format_bytes(max_blocks * layout.block_bytes)
            raise ConfigurationError(f"--kv-host-memory: {size} cannot be had: {error}") from error
        self.max_blocks = max_blocks
        self._blocks = np.frombuffer(memory, dtype=np.uint8).reshape(max_blocks, layout.num_layers, -1)
        self._places: dict[BlockHash, int] = {}
        self._free = list(range(max_blocks - 1, -1, -1))

    def write(self, name: BlockHash, block: BlockData) -> None:
        """Keep a block [layer, words]; there is room for it, as others were removed before."""
        place = self._places.get(name)
        if place is None:
            place = self._free.pop()
        np.copyto(self._blocks[place], block.view(np.uint8))
        self._places[name] = place

    def read(self, name: BlockHash, block: BlockData) -> None:
        """Copy a block into ``block`` [layer, words]; raise TransferError when it is not there."""
        place = self._places.get(name)
        if place is None:
            raise TransferError(f"the block {name.hex()} is not in host memory")
        np.copyto(block.view(np.uint8), self._blocks[place])

    def remove(self, name: BlockHash) -> None:
        """Let another block have the place of one, if it is there."""
        place = self._places.pop(name, None)
        if place is not None:
            self._free.append(place)

    def touch(self, name: BlockHash) -> None:
        """Do nothing: who is least recently used is known elsewhere, and nothing of it is kept over a restart."""
