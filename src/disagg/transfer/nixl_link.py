"""The link over NIXL: lists of pieces of the peer's pool are read straight into the own one.

Blocks travel as they are. NIXL has no deadline of its own, and cannot stop a read: this link gives up by its own clock,
and says that the blocks may still be written to.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np

from disagg.base.clock import Clock
from disagg.base.errors import HungError, TransferError
from disagg.cache.layout import KvLayout
from disagg.costs.links import LinkKind
from disagg.transfer.address import NixlWay, PoolAddress
from disagg.transfer.block_forms import BlockForms
from disagg.transfer.digests import bad_blocks, corrupt
from disagg.transfer.link import KvRead, Transfer, TransferState, check_read
from disagg.transfer.nixl_agent import NixlAgent, Posted
from disagg.transfer.pool import HEADER_BYTES, KvPool, header
from disagg.transfer.source_blocks import BlockPair

MAX_POSTED_BYTES: Final = 16 << 20
"""Most bytes of one list: over shared memory NIXL copies them before it returns, deaf to a cancellation."""
PATIENCE_S: Final = 1.0
"""What a cancelled read, or one whose time is over, gets to end in order."""
PROBE_TIMEOUT_S: Final = 30.0
_POLL_S: Final = 50e-6
_LONGEST_POLL_S: Final = 1e-3


@dataclass(slots=True)
class _Progress:
    """What one transfer has posted last."""

    posted: Posted | None = None


class NixlLink:
    """Reads one peer's pool through NIXL."""

    kind = LinkKind.NIXL

    def __init__(
        self, address: PoolAddress, way: NixlWay, pool: KvPool, agent: NixlAgent, threads: Executor, clock: Clock
    ) -> None:
        """Connect; raise TransferError when the peer is gone or holds blocks of another form than ``pool``."""
        forms = BlockForms(address.layout, pool.layout)
        if not forms.is_same:
            raise TransferError(
                f"NIXL carries blocks as they are, and cannot make {forms.describe()}: use --kv-link tcp"
            )
        self._layout = address.layout
        self._header = header(address.layout, address.incarnation)
        self._start = way.start
        self.host = way.host
        self._pool = pool
        self._agent = agent
        self._threads = threads
        self._clock = clock
        self._lock = threading.Lock()
        self._num_running = 0
        self._is_closed = False
        self._probe_memory: tuple[memoryview, Any] | None = None
        self._peer = agent.add_peer(way.metadata, address.incarnation)
        self._theirs = self._pieces(address.layout, way.start, self._peer)
        self._ours = self._pieces(pool.layout, pool.start)

    def read(self, read: KvRead, on_end: Callable[[Transfer], None]) -> Transfer:
        """See ``Link.read``."""
        digests = check_read(read, self._layout, self._pool.layout)
        if read.behind_step:
            raise TransferError("NIXL does not read behind a step: it cannot see how far the peer's step is")
        transfer = Transfer(read.num_bytes(self._layout, self._pool.layout), self._clock, on_end)
        with self._lock:
            self._num_running += 1
        self._threads.submit(self._run, transfer, read, digests)
        return transfer

    def probe(self, target: memoryview, access: bytes) -> None:
        """See ``Link.probe``: reads the beginning of the peer's pool, again and again where that is short."""
        until_s = self._clock.now() + PROBE_TIMEOUT_S
        start = self._registered(target)
        done = 0
        while done < len(target):
            count = min(len(target) - done, self._layout.total_bytes)
            self._read_bytes(self._start + HEADER_BYTES, start + done, count, until_s, kept=target)
            done += count

    def close(self) -> None:
        """See ``Link.close``: what was posted is read to its end."""
        with self._lock:
            self._is_closed = True
            is_last = not self._num_running
        self._forget_probe_memory()
        if is_last:
            self._agent.remove_peer(self._peer)

    # On the transfer's thread ---------------------------------------------------------------------------------

    def _run(self, transfer: Transfer, read: KvRead, digests: Sequence[bytes]) -> None:
        progress = _Progress()
        transfer.run(partial(self._copy, transfer, read, digests, progress))
        if transfer.state is TransferState.HUNG and progress.posted is not None:
            self._agent.watch(progress.posted, partial(self._settle, transfer))
        else:
            self._end()

    def _settle(self, transfer: Transfer) -> None:
        transfer.settle()
        self._end()

    def _end(self) -> None:
        with self._lock:
            self._num_running -= 1
            is_last = self._is_closed and not self._num_running
        if is_last:
            self._agent.remove_peer(self._peer)

    def _copy(self, transfer: Transfer, read: KvRead, digests: Sequence[bytes], progress: _Progress) -> TransferState:
        if not read.blocks or not read.layers:
            return TransferState.DONE
        until_s = self._clock.now() + read.timeout_s
        size = max(1, MAX_POSTED_BYTES // (len(read.layers) * self._layout.layer_block_bytes))
        for first in range(0, len(read.blocks), size):
            pairs, wanted = read.blocks[first : first + size], digests[first : first + size]
            if transfer.is_cancelled:
                return TransferState.CANCELLED
            self._move(pairs, read.layers, transfer, until_s, progress)
            bad = self._bad(pairs, wanted)
            if bad:
                transfer.num_repeated += len(bad)
                again = [pairs[index] for index in bad]
                self._move(again, read.layers, transfer, until_s, progress)
                if self._bad(again, [wanted[index] for index in bad]):
                    raise corrupt(again[0][0])
        self._check_alive(transfer, until_s, progress)
        return TransferState.DONE

    def _bad(self, pairs: Sequence[BlockPair], digests: Sequence[bytes]) -> list[int]:
        return bad_blocks(self._pool.blocks, [target for _, target in pairs], digests)

    def _move(
        self, pairs: Sequence[BlockPair], layers: range, transfer: Transfer, until_s: float, progress: _Progress
    ) -> None:
        theirs, ours = self._layout.num_blocks, self._pool.layout.num_blocks
        sources = [layer * theirs + source for layer in layers for source, _ in pairs]
        targets = [layer * ours + target for layer in layers for _, target in pairs]
        progress.posted = self._agent.post(self._ours, targets, self._theirs, sources)
        self._wait(progress.posted, until_s, transfer)

    def _check_alive(self, transfer: Transfer, until_s: float, progress: _Progress) -> None:
        """Raise TransferError unless the peer's pool still is that of its incarnation."""
        found = np.zeros(len(self._header), np.uint8)
        registered = self._agent.register((found.ctypes.data, found.nbytes))
        self._read_bytes(self._start, found.ctypes.data, found.nbytes, until_s, found, transfer, progress)
        self._agent.forget(registered)
        if found.tobytes() != self._header:
            raise TransferError("the peer's KV pool has ended")

    def _read_bytes(
        self,
        source: int,
        target: int,
        count: int,
        until_s: float,
        kept: object,
        transfer: Transfer | None = None,
        progress: _Progress | None = None,
    ) -> None:
        """Read bytes that lie one after the other, into registered memory."""
        theirs, ours = self._agent.prepare(source, count, 1, self._peer), self._agent.prepare(target, count, 1)
        posted = self._agent.post(ours, [0], theirs, [0], kept=(kept, theirs, ours))
        if progress is not None:
            progress.posted = posted
        self._wait(posted, until_s, transfer)

    def _wait(self, posted: Posted, until_s: float, transfer: Transfer | None) -> None:
        """Wait for the end of a read; raise HungError when it is given up."""
        pause_s, give_up_s = _POLL_S, until_s
        while not posted.is_over():
            now = self._clock.now()
            if transfer is not None and transfer.is_cancelled:
                give_up_s = min(give_up_s, now + PATIENCE_S)
            if now >= give_up_s:
                raise HungError("NIXL did not complete the read in time, and may still write its blocks")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_POLL_S)

    def _pieces(self, layout: KvLayout, start: int, *peer: str) -> Any:
        count = layout.num_layers * layout.num_blocks
        return self._agent.prepare(start + HEADER_BYTES, layout.layer_block_bytes, count, *peer)

    def _registered(self, target: memoryview) -> int:
        """Return where memory lies, which stays registered until other memory is measured or the link is closed."""
        start = int(np.frombuffer(target, np.uint8).ctypes.data)
        known = self._probe_memory
        if known is None or known[0].nbytes != target.nbytes or known[0].obj is not target.obj:
            self._forget_probe_memory()
            self._probe_memory = (target, self._agent.register((start, target.nbytes)))
        return start

    def _forget_probe_memory(self) -> None:
        if self._probe_memory is not None:
            self._agent.forget(self._probe_memory[1])
            self._probe_memory = None
