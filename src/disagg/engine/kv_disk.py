"""The disk of one instance: a thread that writes KV blocks beside the steps, and one that reads those to come."""

import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from disagg.base.clock import Clock
from disagg.base.errors import TransferError
from disagg.base.ids import BlockHash, BlockId
from disagg.engine.disk_files import BlockFiles
from disagg.scheduling.instance.inputs import LoadEnded
from disagg.scheduling.step.actions import LoadBlocks, SaveBlock
from disagg.scheduling.step.events import BlockSaved
from disagg.transfer.pool import KvPool

WRITER_NICENESS: Final = 10
"""Writing can wait for steps, reading is waited for."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DiskResult:
    """What reading or writing came to; ``targets`` were filled."""

    result: LoadEnded | BlockSaved
    targets: tuple[BlockId, ...] = ()


class KvDisk:
    """Moves blocks between ``pool`` and files. ``wake`` is called from the threads when something has ended."""

    def __init__(self, files: BlockFiles, pool: KvPool, clock: Clock, wake: Callable[[], None]) -> None:
        self._files = files
        self._pool = pool
        self._clock = clock
        self._wake = wake
        self._ended: deque[DiskResult] = deque()
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kv-read")
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kv-write", initializer=_lower_priority)
        self._failure = ""

    def load(self, load: LoadBlocks) -> None:
        """Start to read blocks."""
        self._reader.submit(self._read, load)

    def save(self, save: SaveBlock) -> None:
        """Start to write a block, which must not change meanwhile."""
        self._writer.submit(self._write, save)

    def drop(self, names: tuple[BlockHash, ...]) -> None:
        """Remove files, after what was started before."""
        self._writer.submit(self._remove, names)

    def take_ended(self) -> list[DiskResult]:
        """Return what ended since the last call, in order."""
        ended = []
        while self._ended:
            ended.append(self._ended.popleft())
        return ended

    def close(self) -> None:
        """Let what is being read and written end, and drop what waits."""
        for thread in (self._reader, self._writer):
            thread.shutdown(cancel_futures=True)
        self._files.close()

    def _read(self, load: LoadBlocks) -> None:
        started_s = self._clock.now()
        unreadable: list[BlockHash] = []
        for block in load.blocks:
            try:
                self._files.read(block.name, self._pool.blocks[:, block.target])
                self._files.touch(block.name)
            except Exception as error:  # whoever waits for these blocks must hear of their end
                (logger.warning if isinstance(error, TransferError) else logger.exception)("%s", error)
                unreadable.append(block.name)
        result = LoadEnded(
            request_id=load.request_id,
            epoch=load.epoch,
            num_blocks=len(load.blocks),
            duration_s=self._clock.now() - started_s,
            unreadable=tuple(unreadable),
        )
        self._end(DiskResult(result, tuple(block.target for block in load.blocks)))

    def _write(self, save: SaveBlock) -> None:
        failure = ""
        try:
            self._files.write(save.name, self._pool.blocks[:, save.block])
        except Exception as error:  # whoever keeps the block must hear of the end
            failure = str(error) or type(error).__name__
            if failure != self._failure:
                logger.warning("KV blocks cannot be written to %s: %s", self._files.folder, failure)
        self._failure = failure
        self._end(DiskResult(BlockSaved(name=save.name, failure=failure)))

    def _remove(self, names: tuple[BlockHash, ...]) -> None:
        for name in names:
            try:
                self._files.remove(name)
            except OSError as error:
                logger.warning("the block %s stays on disk: %s", name.hex(), error)

    def _end(self, ended: DiskResult) -> None:
        self._ended.append(ended)
        self._wake()


def _lower_priority() -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), WRITER_NICENESS)
