"""The link between two instances of one host: one copy, straight from the peer's pool into the own one.

The copy runs on a thread of its own, in NumPy calls that release the GIL, each over all layers of a run of
neighbouring blocks. Pages that are not mapped yet are read at half the speed: so a peer's pool can be mapped in the
background when the link is opened. ``disagg bench transfer`` prints how fast it is.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Final

import numpy as np

from disagg.base.clock import Clock
from disagg.base.errors import TransferError
from disagg.costs.links import LinkKind
from disagg.transfer.address import PoolAddress, ShmWay
from disagg.transfer.block_forms import BlockForms
from disagg.transfer.digests import LayerDigests, bad_blocks, block_digest, corrupt
from disagg.transfer.link import KvRead, Transfer, TransferState, check_read
from disagg.transfer.page_toucher import PageToucher
from disagg.transfer.peer_pool import PeerPool
from disagg.transfer.pool import KvPool
from disagg.transfer.source_blocks import BlockPair, SourceBlock, targets_of
from disagg.transfer.wire import groups

MAX_RUN_BYTES: Final = 64 << 20
"""Most bytes copied between two looks at whether the transfer was cancelled: a few milliseconds."""
MAX_CHECKED_BYTES: Final = 4 << 20
"""Most bytes copied before their digests are checked: they are still in the cache then."""


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
        source = self._peer.blocks[read.layers.start : read.layers.stop]
        target = self._pool.blocks[read.layers.start : read.layers.stop]
        most_bytes = MAX_CHECKED_BYTES if digests else MAX_RUN_BYTES
        longest = max(1, most_bytes // (max(1, len(read.layers)) * self._pool.layout.layer_block_bytes))
        if not self._forms.is_same:
            return self._convert(transfer, read, digests)
        done = 0
        for first_source, first_target, count in runs(read.blocks, longest):
            if transfer.is_cancelled:
                return TransferState.CANCELLED
            np.copyto(target[:, first_target : first_target + count], source[:, first_source : first_source + count])
            for index in bad_blocks(target, range(first_target, first_target + count), digests[done : done + count]):
                transfer.num_repeated += 1
                block = first_target + index
                np.copyto(target[:, block], source[:, first_source + index])
                if block_digest(target, block) != digests[done + index]:
                    raise corrupt(first_source + index)
            done += count
        self._peer.check_alive()
        return TransferState.DONE

    def _follow(self, transfer: Transfer, read: KvRead) -> TransferState:
        """Copy the layers that a step of the peer writes, as many at a time as are there."""
        blocks = read.sources
        digests = LayerDigests(len(blocks))
        check = partial(self._check, transfer, transfer.started_s + read.timeout_s)
        for layers in self._peer.progress.follow(read.behind_step, read.layers, check):
            check()
            if self._forms.is_same:
                source, target = (pool[layers.start : layers.stop] for pool in (self._peer.blocks, self._pool.blocks))
                for theirs, ours, count in runs(read.blocks, len(read.blocks)):
                    np.copyto(target[:, ours : ours + count], source[:, theirs : theirs + count])
                came, places = target, [block.target for block in blocks]
            else:
                self._convert_layers(blocks, layers)
                came, places = self._peer.blocks[layers.start : layers.stop], [block.block for block in blocks]
            if read.wants_digests:
                digests.add(came, places)
        self._peer.check_alive()
        transfer.digests = digests.join() if read.wants_digests else b""
        return TransferState.DONE

    def _check(self, transfer: Transfer, until_s: float) -> None:
        """Raise when a wait for the peer's step should end."""
        transfer.check(until_s)
        if self._is_closed:
            raise TransferError("the link was closed: the peer has ended")
        self._peer.check_alive()

    def _convert(self, transfer: Transfer, read: KvRead, digests: Sequence[bytes]) -> TransferState:
        """Take over blocks of another form, a few at a time; what was read is compared with the digests right after."""
        layout = self._peer.layout
        blocks = read.sources
        for group in groups(len(blocks), layout.layer_block_bytes, len(read.layers)):
            if transfer.is_cancelled:
                return TransferState.CANCELLED
            sources = [block.block for block in blocks[group]]
            for attempt in range(2):
                self._convert_layers(blocks[group], read.layers)
                bad = bad_blocks(self._peer.blocks, sources, digests[group])
                if not bad:
                    break
                transfer.num_repeated += len(bad)
                if attempt:
                    raise corrupt(sources[bad[0]])
        self._peer.check_alive()
        return TransferState.DONE

    def _convert_layers(self, blocks: Sequence[SourceBlock], layers: range) -> None:
        """Make own blocks, or parts of them, of these layers of the peer's."""
        sources = [block.block for block in blocks for _ in block.pieces]
        starts = [self._peer.layout.offset(layer, source) for layer in layers for source in sources]
        targets, parts = targets_of(blocks)
        self._forms.convert(self._peer.data, starts, self._pool.data, layers, targets, parts)
