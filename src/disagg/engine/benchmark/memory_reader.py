"""How fast cores read memory right now: on a shared host no constant."""

import os
import threading
import time
from collections.abc import Sequence
from typing import Final

import torch

_BYTES_OF_CORE: Final = 64 << 20
"""Larger than what a core has of the last-level cache."""
_NUM_PASSES: Final = 2


class MemoryReader:
    """Reads memory on all ``cores`` at once: a few milliseconds, little enough to be done while instances compute.

    A core counts the time that it computes for the reading, not what others take of it meanwhile.
    """

    def __init__(self, cores: Sequence[int]) -> None:
        self._data = {core: torch.zeros(_BYTES_OF_CORE // 4, dtype=torch.float32) for core in cores}

    def bytes_per_s(self) -> float:
        """Return what all cores together read."""
        start = threading.Barrier(len(self._data))
        speeds: list[float] = []
        threads = [
            threading.Thread(target=self._read, args=(core, data, start, speeds)) for core, data in self._data.items()
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(speeds)

    @staticmethod
    def _read(core: int, data: torch.Tensor, start: threading.Barrier, speeds: list[float]) -> None:
        os.sched_setaffinity(threading.get_native_id(), {core})
        torch.set_num_threads(1)
        start.wait()
        started_s = time.thread_time()
        for _ in range(_NUM_PASSES):
            data.sum()
        speeds.append(_NUM_PASSES * data.nbytes / (time.thread_time() - started_s))
