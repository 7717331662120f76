"""This process's end of NIXL, an optional library that reads other processes' memory over whatever there is.

RDMA, NVLink, shared memory, sockets: NIXL chooses, and asks nobody for permission. A read that was posted cannot be
taken back: it writes when its peer wakes, released or not. So one that takes too long is watched here to its end.
"""

import importlib
import logging
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Final

import numpy as np

from disagg.base.errors import ConfigurationError, TransferError
from disagg.transfer.address import NixlWay
from disagg.transfer.pool import KvPool, file_bytes

_PACKAGES: Final = ("nixl_cu12", "nixl_cu13")
_MEMORY: Final = "DRAM"
_HERE: Final = "NIXL_INIT_AGENT"
_WATCH_S: Final = 0.05

Region = tuple[int, int]
"""Where memory begins in its process, and its bytes."""


def load_nixl() -> ModuleType:
    """Return NIXL's Python interface; raise ConfigurationError where it is not installed."""
    raises = logging.raiseExceptions
    for name in _PACKAGES:
        try:
            package = importlib.import_module(name)
        except ImportError:
            continue
        logging.raiseExceptions = raises  # what else its import sets up is of no use here: it logs to stdout
        logging.getLogger("nixl").setLevel(logging.WARNING)
        return package
    raise ConfigurationError("--kv-link nixl: NIXL is not installed; pip install 'disagg[nixl]', or take another link")


class Posted:
    """A read under way. ``kept`` is what must not go away before it is over."""

    def __init__(self, agent: Any, handle: Any, is_done: bool, kept: object) -> None:
        self._agent = agent
        self._handle = handle
        self._is_done = is_done
        self._kept = kept

    def is_over(self) -> bool:
        """True once nothing is written any more. Raises TransferError when it has failed, and is over too."""
        if not self._is_done:
            try:
                state = self._agent.check_xfer_state(self._handle)
            except Exception as error:
                raise lost(error) from error
            if state == "PROC":
                return False
            if state != "DONE":
                raise TransferError("NIXL reports a failed read")
            self._is_done = True
        self._handle.release()
        return True


class NixlAgent:
    """Registers one pool, for its owner to write into and for peers to read. Safe from any thread.

    ``host`` is an address of this host, by which a reader sees whether it is on the same one.
    """

    def __init__(self, pool: KvPool, host: str) -> None:
        """Raises ConfigurationError where NIXL is not installed or cannot be used."""
        nixl = load_nixl()
        try:
            settings = nixl.nixl_agent_config(
                backends=["UCX"], sync_mode=nixl.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
            )
            self._agent: Any = nixl.nixl_agent(pool.incarnation, settings)
            self.register((pool.start, file_bytes(pool.layout)))
            metadata = self._agent.get_agent_metadata()
        except Exception as error:  # the library has a class for each kind of error, and no common one
            raise ConfigurationError(
                f"--kv-link nixl: NIXL cannot use this host's memory or network: {error}"
            ) from error
        self.way = NixlWay(host=host, metadata=metadata, start=pool.start)
        self._hung: list[tuple[Posted, Callable[[], None]]] = []
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def register(self, region: Region) -> Any:
        """Let NIXL read and write memory of this process. Return what ``forget`` takes."""
        return self._agent.register_memory([(*region, 0, "")], _MEMORY)

    def forget(self, registered: Any) -> None:
        """Take memory back from NIXL."""
        self._agent.deregister_memory(registered)

    def add_peer(self, metadata: bytes, incarnation: str) -> str:
        """Make a peer known; raise TransferError when it cannot be reached or is another one."""
        try:
            name = self._agent.add_remote_agent(metadata)
            name = name.decode() if isinstance(name, bytes) else str(name)
        except Exception as error:
            raise lost(error) from error
        if name != incarnation:
            raise TransferError(f"the NIXL agent at this address belongs to incarnation {name}, not {incarnation}")
        return name

    def remove_peer(self, name: str) -> None:
        """Forget a peer from which nothing is read any more."""
        try:
            self._agent.remove_remote_agent(name)
        except Exception as error:
            logging.getLogger(__name__).debug("NIXL had forgotten %s: %s", name, error)

    def prepare(self, start: int, piece_bytes: int, count: int, peer: str = _HERE) -> Any:
        """Return a list of ``count`` pieces that lie one after the other, here or at a peer."""
        row = np.array([(start, piece_bytes, 0, piece_bytes, count)], np.uint64)
        try:
            return self._agent.prep_xfer_dlist(peer, row, _MEMORY)
        except Exception as error:
            raise lost(error) from error

    def post(self, targets: Any, to: Sequence[int], sources: Any, of: Sequence[int], kept: object = None) -> Posted:
        """Start reading pieces of one prepared list into those of another. Raises TransferError."""
        try:
            handle = self._agent.make_prepped_xfer(
                "READ", targets, np.array(to, np.int32), sources, np.array(of, np.int32)
            )
            state = self._agent.transfer(handle)
        except Exception as error:
            raise lost(error) from error
        return Posted(self._agent, handle, state == "DONE", kept)

    def watch(self, posted: Posted, on_over: Callable[[], None]) -> None:
        """Call ``on_over``, on a thread of this agent, when a read that was given up writes nothing any more."""
        with self._lock:
            self._hung.append((posted, on_over))
            if len(self._hung) == 1:
                threading.Thread(target=self._watch, name="kv-nixl-watch", daemon=True).start()

    def close(self) -> None:
        """Stop watching. What still hangs ends with the process."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(_WATCH_S):
            with self._lock:
                hung = list(self._hung)
            over = [one for one in hung if _is_over(one[0])]
            for _, on_over in over:
                on_over()
            with self._lock:
                self._hung = [one for one in self._hung if one not in over]
                if not self._hung:
                    return


def lost(error: Exception) -> TransferError:
    """Return what an error of the library means for a transfer."""
    return TransferError(f"the peer's KV pool has ended, or NIXL cannot reach it any more: {error}")


def _is_over(posted: Posted) -> bool:
    try:
        return posted.is_over()
    except TransferError:
        return True
