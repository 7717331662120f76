"""Reads of a peer's pool over each link, and the limits beside which they stand."""

import enum
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import msgspec
import numpy as np

from disagg.base.clock import Clock, MonotonicClock
from disagg.base.errors import ConfigurationError, InternalError, TransferError
from disagg.base.ids import BlockId
from disagg.base.transfer_settings import KvLinkChoice, KvTransferDtype, TransferSettings
from disagg.cache.layout import KvFormat, KvLayout
from disagg.costs.links import KvCodec, LinkKind
from disagg.transfer.address import ShmWay, decode_address
from disagg.transfer.benchmark.peer_task import PeerReady, PeerTask
from disagg.transfer.block_forms import BlockForms, places_of
from disagg.transfer.digests import join_digests, split_digests
from disagg.transfer.int8_codec import Int8Codec
from disagg.transfer.link import KvRead, Link, Transfer, TransferState
from disagg.transfer.links import Links
from disagg.transfer.nixl_agent import NixlAgent
from disagg.transfer.page_toucher import wait_until_touched
from disagg.transfer.peer_pool import PeerPool
from disagg.transfer.pool import KvPool
from disagg.transfer.source_blocks import BlockPair

HOST: Final = "127.0.0.1"
_DEADLINE_S: Final = 60.0
_LOCAL: Final = "bb"
_PEER: Final = "aa"


class Pieces(enum.Enum):
    """How the blocks of a read lie in both pools."""

    NEIGHBOURS = "neighbours"
    SCATTERED = "scattered"


@dataclass(frozen=True)
class TransferFigure:
    """Median speed of one kind of read, in bytes of KV per second, beside the limit measured in the same run.

    The limit of shared memory, and of NIXL on one host, is a plain copy of as many bytes out of the other process's
    memory, that of TCP a socket that receives them into one buffer.
    """

    link: LinkKind
    codec: KvCodec
    pieces: Pieces
    num_pieces: int
    """Runs of bytes without a gap."""
    digests: bool
    num_bytes: int
    bytes_per_s: float
    limit_bytes_per_s: float

    @property
    def share(self) -> float:
        """Of the limit."""
        return self.bytes_per_s / self.limit_bytes_per_s


class TransferBenchmark:
    """Two processes with a pool each. Use as a context manager."""

    def __init__(
        self, layout: KvLayout, num_blocks: int, num_reads: int, num_streams: int, *, counts_cpu: bool = False
    ) -> None:
        """``num_blocks`` of ``layout.num_blocks`` are read each time, ``num_reads`` times.

        With ``counts_cpu`` times are this process's CPU time: what other programs do on these cores hardly changes it.
        """
        self.layout = layout
        self.num_streams = num_streams
        self._num_blocks = num_blocks
        self._num_reads = num_reads
        self._clock: Clock = MonotonicClock()
        self._stopwatch = time.process_time if counts_cpu else time.perf_counter
        self._places = np.random.default_rng(1)
        self._stack = ExitStack()

    @property
    def num_bytes(self) -> int:
        """Of one read."""
        return self._num_blocks * self.layout.block_bytes

    def __enter__(self) -> "TransferBenchmark":
        with ExitStack() as stack:
            peer = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", "disagg.transfer.benchmark"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                )
            )
            assert peer.stdin is not None
            assert peer.stdout is not None
            stack.callback(peer.stdin.close)
            self._pool = KvPool(self.layout, _LOCAL)
            stack.callback(self._pool.close)
            self._nixl = self._nixl_agent(stack)
            task = PeerTask(
                layout=self.layout,
                incarnation=_PEER,
                host=HOST,
                raw_bytes=self.num_bytes,
                has_nixl=self._nixl is not None,
            )
            peer.stdin.write(msgspec.json.encode(task) + b"\n")
            peer.stdin.flush()
            line = peer.stdout.readline()
            if not line:
                raise InternalError("the other process of the benchmark ended before it was ready")
            self._peer = msgspec.json.decode(line, type=PeerReady)
            for layer in range(self.layout.num_layers):
                self._pool.touch(layer, 0, self.layout.num_blocks)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _nixl_agent(self, stack: ExitStack) -> NixlAgent | None:
        """Return this process's end of NIXL; None where it is not installed."""
        try:
            agent = NixlAgent(self._pool, HOST)
        except ConfigurationError:
            return None
        stack.callback(agent.close)
        return agent

    def measure(self) -> Iterator[TransferFigure]:
        """Yield the figures of all links, each beside its limit: reads and what bounds them take turns."""
        for choice, dtype, limit in (
            (KvLinkChoice.SHM, KvTransferDtype.RAW, self._plain_copy),
            (KvLinkChoice.TCP, KvTransferDtype.RAW, self._plain_socket),
            (KvLinkChoice.TCP, KvTransferDtype.INT8, self._plain_socket),
            (KvLinkChoice.NIXL, KvTransferDtype.RAW, self._plain_copy),
        ):
            if choice is KvLinkChoice.NIXL and self._nixl is None:
                continue
            settings = TransferSettings(kv_link=choice, kv_transfer_dtype=dtype, kv_streams=self.num_streams)
            with ThreadPoolExecutor(max_workers=1) as thread:
                links = Links(self._pool, thread, self._clock, settings, maps_ahead=True, nixl=self._nixl)
                try:
                    link = links.open(self._peer.nixl_pool if choice is KvLinkChoice.NIXL else self._peer.offer.pool)
                    wait_until_touched(_DEADLINE_S)
                    yield from self._measure(link, KvCodec(dtype.value), limit)
                finally:
                    links.close()

    def _measure(self, link: Link, codec: KvCodec, limit: Callable[[], None]) -> Iterator[TransferFigure]:
        for digests in (False, True):
            for pieces in Pieces:
                reads = self._reads(pieces, digests=digests)
                speed, limit_speed = self._speeds(lambda reads=reads: _wait_for(link, next(reads)), limit)  # type: ignore[misc]
                yield TransferFigure(
                    link=link.kind,
                    codec=codec,
                    pieces=pieces,
                    num_pieces=self.layout.num_layers * (1 if pieces is Pieces.NEIGHBOURS else self._num_blocks),
                    digests=digests,
                    num_bytes=self.num_bytes,
                    bytes_per_s=speed,
                    limit_bytes_per_s=limit_speed,
                )

    def digest_bytes_per_s(self) -> float:
        """Return how fast digests are made of blocks that lie in memory, not in the cache."""
        blocks = [BlockId(block) for block in range(self._num_blocks)]
        return self._speed(lambda: join_digests(self._pool.blocks, blocks))

    def coding_bytes_per_s(self) -> tuple[float, float]:
        """Return how fast one core codes blocks as int8, and decodes them."""
        codec = Int8Codec(self.layout)
        blocks = [BlockId(block) for block in range(self._num_blocks)]
        layers = range(self.layout.num_layers)
        coded = memoryview(bytearray(codec.layer_bytes * len(blocks) * len(layers)))
        return (
            self._speed(lambda: codec.encode(self._pool.data, layers, blocks, coded)),
            self._speed(lambda: codec.decode(coded, layers, blocks, self._pool.data)),
        )

    def conversion_bytes_per_s(self) -> float:
        """Return how fast one core makes blocks of the pool of those of a peer with another order of the elements."""
        format_of = {KvFormat.INTERLEAVED: KvFormat.TOKEN_MAJOR, KvFormat.TOKEN_MAJOR: KvFormat.INTERLEAVED}
        theirs = msgspec.structs.replace(self.layout, format=format_of[self.layout.format])
        forms = BlockForms(theirs, self.layout)
        blocks = [BlockId(block) for block in range(self._num_blocks)]
        layers = range(self.layout.num_layers)
        source = memoryview(bytearray(self.num_bytes))
        starts = [index * theirs.layer_block_bytes for index in range(len(blocks) * len(layers))]
        return self._speed(lambda: forms.convert(source, starts, self._pool.data, layers, blocks))

    def resize_bytes_per_s(self) -> float:
        """Return how fast one core makes blocks of the pool of those of a peer that are twice as large."""
        blocks, layers = [BlockId(block) for block in range(self._num_blocks)], range(self.layout.num_layers)
        sources = [BlockId(block // 2) for block in blocks]
        theirs = msgspec.structs.replace(self.layout, block_size=2 * self.layout.block_size, num_blocks=sources[-1] + 1)
        forms, parts = BlockForms(theirs, self.layout), [block % 2 for block in blocks]
        source, starts = memoryview(bytearray(theirs.total_bytes)), places_of(theirs, layers, sources)
        return self._speed(lambda: forms.convert(source, starts, self._pool.data, layers, blocks, parts))

    def _reads(self, pieces: Pieces, *, digests: bool) -> Iterator[KvRead]:
        offer = self._peer.offer
        of_block = split_digests(offer.digests, len(offer.block_ids))
        generator = np.random.default_rng(0)
        while True:
            pairs = _pairs(pieces, self.layout.num_blocks, self._num_blocks, generator)
            wanted = b"".join([of_block[source] for source, _ in pairs]) if digests else b""
            yield KvRead(pairs, range(self.layout.num_layers), digests=wanted, access=offer.access)

    def _speed(self, move: Callable[[], object]) -> float:
        """Return the median bytes per second of a call that moves the bytes of one read."""
        return self._speeds(move)[0]

    def _speeds(self, *moves: Callable[[], object]) -> list[float]:
        """Return that of several calls which take turns, so that what else the machine does slows all of them."""
        times_s: list[list[float]] = [[] for _ in moves]
        for repeat in range(1 + self._num_reads):
            for move, taken_s in zip(moves, times_s, strict=True):
                started_s = self._stopwatch()
                move()
                if repeat:  # the first time connections are made and pages mapped
                    taken_s.append(self._stopwatch() - started_s)
        return [self.num_bytes / float(np.median(taken_s)) for taken_s in times_s]

    @cached_property
    def _mapped(self) -> PeerPool:
        address = decode_address(self._peer.offer.pool)
        (way,) = [way for way in address.ways if isinstance(way, ShmWay)]
        return PeerPool(address, way)

    @cached_property
    def _raw(self) -> socket.socket:
        connection = self._stack.enter_context(socket.create_connection((HOST, self._peer.raw_port), _DEADLINE_S))
        connection.settimeout(None)
        return connection

    def _plain_copy(self) -> None:
        """Copy as many bytes as a read has, without a gap, out of the other process's memory: other ones each time."""
        words = self.num_bytes // self._mapped.blocks.itemsize
        start = int(self._places.integers(0, self._mapped.blocks.size - words + 1))
        part = slice(start, start + words)
        np.copyto(self._pool.blocks.reshape(-1)[part], self._mapped.blocks.reshape(-1)[part])

    def _plain_socket(self) -> None:
        """Receive as many bytes as a read has into one buffer."""
        self._raw.sendall(b"x")
        target = self._pool.data[: self.num_bytes]
        while target:
            count = self._raw.recv_into(target, 0, socket.MSG_WAITALL)
            if count == 0:
                raise InternalError("the other process of the benchmark has ended")
            target = target[count:]


def _pairs(pieces: Pieces, num_blocks: int, num_wanted: int, generator: np.random.Generator) -> Sequence[BlockPair]:
    """Return blocks of both pools, other ones each time."""
    if pieces is Pieces.SCATTERED:
        # Even blocks only: none has a neighbour.
        sources, targets = (2 * generator.permutation(num_blocks // 2)[:num_wanted] for _ in range(2))
        return [
            (BlockId(source), BlockId(target))
            for source, target in zip(sources.tolist(), targets.tolist(), strict=True)
        ]
    first_source, first_target = generator.integers(0, num_blocks - num_wanted + 1, 2).tolist()
    return [(BlockId(first_source + n), BlockId(first_target + n)) for n in range(num_wanted)]


def _wait_for(link: Link, read: KvRead) -> None:
    ended = threading.Event()
    transfers: list[Transfer] = []

    def end(transfer: Transfer) -> None:
        transfers.append(transfer)
        ended.set()

    link.read(read, end)
    if not ended.wait(_DEADLINE_S):
        raise TransferError(f"a read over {link.kind.value} did not end in {_DEADLINE_S:g} s")
    if transfers[0].state is not TransferState.DONE:
        raise TransferError(f"a read over {link.kind.value} failed: {transfers[0].failure}")
