"""The tiers behind the pool of one instance: of each, a thread that writes KV blocks beside the steps, and a reader.

Those of a device's pool pass through its staging area in host memory.
"""

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from disagg.base.clock import Clock
from disagg.base.errors import TransferError
from disagg.base.ids import BlockHash, BlockId
from disagg.base.kv_events import Medium
from disagg.scheduling.instance.inputs import LoadEnded
from disagg.scheduling.step.actions import BlockLoad, DropSaved, LoadBlocks, SaveBlock
from disagg.scheduling.step.events import BlockSaved, TierRead
from disagg.transfer.pool import KvPool

WRITER_NICENESS: Final = 10
"""Writing can wait for steps, reading is waited for."""

BlockData = NDArray[np.unsignedinteger[Any]]
"""One block as [layer, words]."""

logger = logging.getLogger(__name__)


class BlockStore(Protocol):
    """Where the blocks of one tier are, under their names. Different blocks may be used by several threads at once."""

    @property
    def place(self) -> str:
        """Where it is, in words."""

    def write(self, name: BlockHash, block: BlockData) -> None:
        """Keep a block; raise OSError when it cannot be kept."""

    def read(self, name: BlockHash, block: BlockData) -> None:
        """Read a block into ``block``; raise TransferError when it is not there as it was written."""

    def remove(self, name: BlockHash) -> None:
        """Let go of a block, if it is there."""

    def touch(self, name: BlockHash) -> None:
        """Note that a block was used."""


@dataclass(frozen=True, slots=True)
class TierResult:
    """What reading or writing came to; ``targets`` were filled."""

    result: LoadEnded | BlockSaved
    targets: tuple[BlockId, ...] = ()


class KvTiers:
    """Moves blocks between ``pool`` and ``stores``. ``wake`` is called from the threads when something has ended."""

    def __init__(
        self, stores: Mapping[Medium, BlockStore], pool: KvPool, clock: Clock, wake: Callable[[], None]
    ) -> None:
        self._wake = wake
        self._ended: deque[TierResult] = deque()
        self._tiers = {medium: _TierThreads(medium, store, pool, clock, self._end) for medium, store in stores.items()}

    def load(self, load: LoadBlocks) -> None:
        """Start to read blocks, of all tiers side by side."""
        by_medium = sorted(load.blocks, key=lambda block: block.medium.value)
        parts = {medium: list(blocks) for medium, blocks in groupby(by_medium, key=lambda block: block.medium)}
        loading = _Loading(load, len(parts), self._end)
        for medium, blocks in parts.items():
            self._tiers[medium].read(blocks, loading)

    def save(self, save: SaveBlock) -> None:
        """Start to write a block, which must not change meanwhile."""
        self._tiers[save.medium].write(save)

    def drop(self, drop: DropSaved) -> None:
        """Let go of blocks, after what was started before."""
        self._tiers[drop.medium].remove(drop.names)

    def take_ended(self) -> list[TierResult]:
        """Return what ended since the last call, in order."""
        ended = []
        while self._ended:
            ended.append(self._ended.popleft())
        return ended

    def close(self) -> None:
        """Let what is being read and written end, and drop what waits."""
        for tier in self._tiers.values():
            tier.close()

    def _end(self, ended: TierResult) -> None:
        self._ended.append(ended)
        self._wake()


class _Loading:
    """A read of ``num_parts`` tiers, which ends with the last of them."""

    def __init__(self, load: LoadBlocks, num_parts: int, end: Callable[[TierResult], None]) -> None:
        self._load = load
        self._num_left = num_parts
        self._end = end
        self._reads: list[TierRead] = []
        self._lock = threading.Lock()

    def end_part(self, read: TierRead) -> None:
        with self._lock:
            self._reads.append(read)
            self._num_left -= 1
            if self._num_left:
                return
        load, reads = self._load, tuple(sorted(self._reads, key=lambda read: read.medium.value))
        result = LoadEnded(request_id=load.request_id, epoch=load.epoch, reads=reads)
        self._end(TierResult(result, tuple(block.target for block in load.blocks)))


class _TierThreads:
    """The two threads of one tier."""

    def __init__(
        self, medium: Medium, store: BlockStore, pool: KvPool, clock: Clock, end: Callable[[TierResult], None]
    ) -> None:
        self._medium = medium
        self._store = store
        self._pool = pool
        self._clock = clock
        self._end = end
        name = medium.value.lower()
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"kv-read-{name}")
        self._writer = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix=f"kv-write-{name}", initializer=_lower_priority
        )
        self._failure = ""

    def read(self, blocks: Sequence[BlockLoad], loading: _Loading) -> None:
        self._reader.submit(self._read, blocks, loading)

    def write(self, save: SaveBlock) -> None:
        self._writer.submit(self._write, save)

    def remove(self, names: tuple[BlockHash, ...]) -> None:
        self._writer.submit(self._remove, names)

    def close(self) -> None:
        for thread in (self._reader, self._writer):
            thread.shutdown(cancel_futures=True)

    def _read(self, blocks: Sequence[BlockLoad], loading: _Loading) -> None:
        started_s = self._clock.now()
        unreadable: list[BlockHash] = []
        for block in blocks:
            try:
                self._store.read(block.name, self._pool.blocks[:, block.target])
                self._store.touch(block.name)
            except Exception as error:  # whoever waits for these blocks must hear of their end
                (logger.warning if isinstance(error, TransferError) else logger.exception)("%s", error)
                unreadable.append(block.name)
        loading.end_part(TierRead(self._medium, len(blocks), self._clock.now() - started_s, tuple(unreadable)))

    def _write(self, save: SaveBlock) -> None:
        failure = ""
        try:
            self._store.write(save.name, self._pool.blocks[:, save.block])
        except Exception as error:  # whoever keeps the block must hear of the end
            failure = str(error) or type(error).__name__
            if failure != self._failure:
                logger.warning("KV blocks cannot be written to %s: %s", self._store.place, failure)
        self._failure = failure
        self._end(TierResult(BlockSaved(name=save.name, medium=self._medium, failure=failure)))

    def _remove(self, names: tuple[BlockHash, ...]) -> None:
        for name in names:
            try:
                self._store.remove(name)
            except OSError as error:
                logger.warning("the block %s stays in %s: %s", name.hex(), self._store.place, error)


def _lower_priority() -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), WRITER_NICENESS)
