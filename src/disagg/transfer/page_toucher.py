"""Mapping a pool's memory before requests need it, in the background."""

import logging
import os
import threading
from typing import Final, Protocol

from disagg.base.errors import DisaggError
from disagg.cache.layout import KvLayout

_BLOCKS_AT_ONCE: Final = 64

_THREAD_NAME: Final = "kv-touch"

logger = logging.getLogger(__name__)


class Touchable(Protocol):
    """A pool, the own one or a peer's."""

    layout: KvLayout

    def touch(self, layer: int, first_block: int, num_blocks: int) -> None:
        """Let the kernel map the memory of some blocks of one layer now; raise DisaggError when it has none left."""


class PageToucher:
    """A thread of lowest priority that touches a pool's blocks in the order in which they are first handed out.

    A first write to 1 GiB takes 0.6 s (on a virtual machine whose host has to provide the memory too, up to 3 s):
    too much for a start that should take few seconds, and for the first requests alike. Mapping as much that a peer
    has written takes 0.1 s, and a read that does so page by page has half the bandwidth.
    """

    def __init__(self, pool: Touchable) -> None:
        self._pool = pool
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._touch_all, name=_THREAD_NAME, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Stop after the blocks being touched, and wait for that."""
        self._is_stopping.set()
        self._thread.join()

    def _touch_all(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        layout = self._pool.layout
        try:
            for first in range(0, layout.num_blocks, _BLOCKS_AT_ONCE):
                for layer in range(layout.num_layers):
                    if self._is_stopping.is_set():
                        return
                    self._pool.touch(layer, first, min(_BLOCKS_AT_ONCE, layout.num_blocks - first))
        except DisaggError as error:
            logger.error("%s", error)


def wait_until_touched(timeout_s: float) -> bool:
    """Wait for the pools of this process to be touched to their ends; return False when that took too long."""
    touching = [thread for thread in threading.enumerate() if thread.name == _THREAD_NAME]
    for thread in touching:
        thread.join(timeout_s)
    return not any(thread.is_alive() for thread in touching)
