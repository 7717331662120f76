"""The link between two instances of one host: one copy, straight from the peer's pool into the own one.

The copy runs on a thread of its own, in NumPy calls that release the GIL, each over all layers of a run of
neighbouring blocks. On one core of a Zen 5 server, for 32 blocks of 24 KB per layer, ``benchmarks/kv_pull.py`` prints
20 GB/s for neighbours and 12 for scattered blocks, where a plain copy makes 20-25. Blocks whose pages are not
mapped yet are read at 9 or 5 GB/s: so a peer's pool can be mapped in the background when the link is opened.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Final

import numpy as np

from disagg.base.clock import Clock
from disagg.transfer.address import ShmAddress
from disagg.transfer.link import BlockPair, Transfer, TransferState, check_ranges
from disagg.transfer.page_toucher import PageToucher
from disagg.transfer.peer_pool import PeerPool, check_compatible
from disagg.transfer.pool import KvPool

MAX_RUN_BYTES: Final = 64 << 20
"""Most bytes copied between two looks at whether the transfer was cancelled: a few milliseconds."""


def runs(blocks: Sequence[BlockPair], longest: int) -> Iterator[tuple[int, int, int]]:
    """Join pairs that are neighbours in both pools: yield (first source, first target, number of blocks)."""
    index = 0
    while index < len(blocks):
        source, target = blocks[index]
        count = 1
        while (
            count < longest
            and index + count < len(blocks)
            and blocks[index + count] == (source + count, target + count)
        ):
            count += 1
        yield source, target, count
        index += count


class ShmLink:
    """Reads one peer's pool through shared memory."""

    def __init__(self, address: ShmAddress, pool: KvPool, thread: Executor, clock: Clock, maps_ahead: bool) -> None:
        """Map the peer's pool; raise TransferError when it is gone or holds other blocks than ``pool``."""
        check_compatible(address.layout, pool.layout)
        self._peer = PeerPool(address)
        self._pool = pool
        self._thread = thread
        self._clock = clock
        self._toucher = PageToucher(self._peer) if maps_ahead else None
        if self._toucher is not None:
            self._toucher.start()

    def read(self, blocks: Sequence[BlockPair], layers: range, on_end: Callable[[Transfer], None]) -> Transfer:
        """See ``Link.read``."""
        check_ranges(blocks, layers, self._peer.layout, self._pool.layout)
        num_bytes = len(blocks) * len(layers) * self._pool.layout.layer_block_bytes
        transfer = Transfer(num_bytes, self._clock, on_end)
        self._thread.submit(transfer.run, partial(self._copy, transfer, tuple(blocks), layers))
        return transfer

    def close(self) -> None:
        """See ``Link.close``: the mapping goes with the last transfer that uses it."""
        if self._toucher is not None:
            self._toucher.stop()

    def _copy(self, transfer: Transfer, blocks: Sequence[BlockPair], layers: range) -> TransferState:
        source = self._peer.blocks[layers.start : layers.stop]
        target = self._pool.blocks[layers.start : layers.stop]
        longest = max(1, MAX_RUN_BYTES // (max(1, len(layers)) * self._pool.layout.layer_block_bytes))
        for first_source, first_target, count in runs(blocks, longest):
            if transfer.is_cancelled:
                return TransferState.CANCELLED
            np.copyto(target[:, first_target : first_target + count], source[:, first_source : first_source + count])
        self._peer.check_alive()
        return TransferState.DONE
