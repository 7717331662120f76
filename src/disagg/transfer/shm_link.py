"""The link between two instances of one host: one copy, straight from the peer's pool into the own one.

The copy runs on a thread of its own, in compiled code that releases the GIL and writes past the caches: the peer's
bytes are in the cache then, and are hashed there. Pages that are not mapped yet are read at half the speed: so a peer's
pool can be mapped in the background when the link is opened. ``disagg bench transfer`` prints how fast it is.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial

import numpy as np

from disagg.base.clock import Clock
from disagg.base.errors import TransferError
from disagg.costs.links import LinkKind
from disagg.transfer.address import PoolAddress, ShmWay
from disagg.transfer.block_forms import BlockForms, places_of
from disagg.transfer.digests import LayerDigests, bad_blocks, corrupt
from disagg.transfer.link import KvRead, Transfer, TransferState, check_read
from disagg.transfer.page_toucher import PageToucher
from disagg.transfer.peer_pool import PeerPool
from disagg.transfer.pool import KvPool
from disagg.transfer.source_blocks import SourceBlock, targets_of
from disagg.transfer.wire import groups


class ShmLink:
    """Reads one peer's pool through shared memory."""

    kind = LinkKind.SHM

    def __init__(
        self, address: PoolAddress, way: ShmWay, pool: KvPool, threads: Executor, clock: Clock, *, maps_ahead: bool
    ) -> None:
        """Map the peer's pool; raise TransferError when it is gone or holds other blocks than ``pool``."""
        self._forms = BlockForms(address.layout, pool.layout)
        self._peer = PeerPool(address, way)
        self._pool = pool
        self._threads = threads
        self._clock = clock
        self._is_closed = False
        self._toucher = PageToucher(self._peer) if maps_ahead else None
        if self._toucher is not None:
            self._toucher.start()

    def read(self, read: KvRead, on_end: Callable[[Transfer], None]) -> Transfer:
        """See ``Link.read``."""
        digests = check_read(read, self._peer.layout, self._pool.layout)
        transfer = Transfer(read.num_bytes(self._peer.layout, self._pool.layout), self._clock, on_end)
        copy = partial(self._copy, transfer, read, digests)
        if read.behind_step:
            copy = partial(self._follow, transfer, read)
        self._threads.submit(transfer.run, copy)
        return transfer

    def probe(self, target: memoryview, access: bytes) -> None:
        """See ``Link.probe``: copies the beginning of the peer's pool, again and again where that is short."""
        source, rest = self._peer.blocks.reshape(-1).view(np.uint8), np.frombuffer(target, np.uint8)
        while len(rest):
            count = min(len(source), len(rest))
            np.copyto(rest[:count], source[:count])
            rest = rest[count:]
        self._peer.check_alive()

    def close(self) -> None:
        """See ``Link.close``: the mapping goes with the last transfer that uses it; one behind a step fails now."""
        self._is_closed = True
        if self._toucher is not None:
            self._toucher.stop()

    def _copy(self, transfer: Transfer, read: KvRead, digests: Sequence[bytes]) -> TransferState:
        """Take blocks over, a few at a time; what was read is compared with the digests while it is in the cache."""
        blocks = read.sources
        for group in groups(len(blocks), self._peer.layout.layer_block_bytes, len(read.layers)):
            if transfer.is_cancelled:
                return TransferState.CANCELLED
            bad = self._take_checked(blocks[group], read.layers, digests[group])
            if bad:
                transfer.num_repeated += len(bad)
                again = [blocks[group][index] for index in bad]
                if still_bad := self._take_checked(again, read.layers, [digests[group][index] for index in bad]):
                    raise corrupt(again[still_bad[0]].block)
        self._peer.check_alive()
        return TransferState.DONE

    def _follow(self, transfer: Transfer, read: KvRead) -> TransferState:
        """Take over the layers that a step of the peer writes, as many at a time as are there."""
        blocks = read.sources
        sources = [block.block for block in blocks]
        digests = LayerDigests(len(blocks))
        check = partial(self._check, transfer, transfer.started_s + read.timeout_s)
        for layers in self._peer.progress.follow(read.behind_step, read.layers, check):
            check()
            self._take(blocks, layers)
            if read.wants_digests:
                digests.add(self._peer.blocks[layers.start : layers.stop], sources)
        self._peer.check_alive()
        transfer.digests = digests.join() if read.wants_digests else b""
        return TransferState.DONE

    def _check(self, transfer: Transfer, until_s: float) -> None:
        """Raise when a wait for the peer's step should end."""
        transfer.check(until_s)
        if self._is_closed:
            raise TransferError("the link was closed: the peer has ended")
        self._peer.check_alive()

    def _take_checked(self, blocks: Sequence[SourceBlock], layers: range, digests: Sequence[bytes]) -> list[int]:
        """Take blocks over; return the places of those that came with another digest."""
        self._take(blocks, layers)
        return bad_blocks(self._peer.blocks, [block.block for block in blocks], digests)

    def _take(self, blocks: Sequence[SourceBlock], layers: range) -> None:
        """Make own blocks, or parts of them, of these layers of the peer's."""
        sources = [block.block for block in blocks for _ in block.pieces]
        targets, parts = targets_of(blocks)
        starts = places_of(self._peer.layout, layers, sources)
        self._forms.convert(self._peer.data, starts, self._pool.data, layers, targets, parts)
