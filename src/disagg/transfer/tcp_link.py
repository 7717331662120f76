"""The link to an instance on another host: its ``KvServer`` is asked for blocks, which go straight into the own pool.

A large read is shared out to several connections, each with a thread. Bytes are hashed group by group as they arrive,
while the kernel receives the next ones.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np

from disagg.base.clock import Clock
from disagg.base.errors import TransferError
from disagg.base.transfer_settings import KvTransferDtype, TransferSettings
from disagg.costs.codec_choice import CodecChoice
from disagg.costs.links import KvCodec, LinkKind
from disagg.transfer.address import PoolAddress, TcpWay
from disagg.transfer.block_forms import BlockForms, ConvertedBlocks
from disagg.transfer.coded_blocks import CodedBlocks
from disagg.transfer.digests import LayerDigests, bad_blocks, corrupt
from disagg.transfer.kv_socket import KvSocket
from disagg.transfer.link import KvRead, Transfer, TransferState, check_read
from disagg.transfer.pool import Blocks, KvPool
from disagg.transfer.source_blocks import SourceBlock
from disagg.transfer.wire import (
    MAX_REPLY_BYTES,
    ReadRequest,
    Reply,
    decode_reply,
    encode_frame,
    groups,
    hello,
    pieces,
)

MIN_STREAM_BYTES: Final = 4 << 20
"""Fewer bytes than this are not worth another connection."""
PROBE_TIMEOUT_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class _Part:
    """What one connection reads of a transfer."""

    blocks: Sequence[SourceBlock]
    digests: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class _Ask:
    """What all parts of a transfer have in common."""

    read: KvRead
    codec: KvCodec
    check: Callable[[], None]


_Receive = Callable[[KvSocket, Sequence[SourceBlock], Sequence[bytes]], list[int]]
"""Takes over one group, and returns the places in it of blocks that came with another digest."""


class TcpLink:
    """Reads one peer's pool over TCP. Connections are made at the first read, and kept for the next ones."""

    kind = LinkKind.TCP

    def __init__(
        self,
        address: PoolAddress,
        way: TcpWay,
        pool: KvPool,
        threads: Executor,
        clock: Clock,
        settings: TransferSettings,
    ) -> None:
        """Raise TransferError when the peer's pool holds other blocks than ``pool``."""
        self._forms = BlockForms(address.layout, pool.layout)
        self._address = address
        self._way = way
        self._pool = pool
        self._threads = threads
        self._clock = clock
        self._num_streams = settings.kv_streams
        self._helpers = ThreadPoolExecutor(max(1, settings.kv_streams - 1), thread_name_prefix="kv-stream")
        self._dtype = settings.kv_transfer_dtype
        self._codecs = CodecChoice()
        self._lock = threading.Lock()
        self._idle: list[KvSocket] = []
        self._in_use: set[KvSocket] = set()
        self._is_closed = False

    def read(self, read: KvRead, on_end: Callable[[Transfer], None]) -> Transfer:
        """See ``Link.read``."""
        digests = check_read(read, self._address.layout, self._pool.layout)
        transfer = Transfer(read.num_bytes(self._address.layout, self._pool.layout), self._clock, on_end)
        if read.behind_step:
            self._threads.submit(transfer.run, partial(self._follow, transfer, read))
            return transfer
        transfer.codec = self._codec(transfer.num_bytes)
        self._threads.submit(transfer.run, partial(self._copy, transfer, read, digests))
        return transfer

    def probe(self, target: memoryview, access: bytes) -> None:
        """See ``Link.probe``: over as many connections as a read of so many bytes. What it takes is remembered."""
        count = max(1, min(self._num_streams, len(target) // MIN_STREAM_BYTES))
        size = -(-len(target) // count)
        parts = [target[start : start + size] for start in range(0, len(target), size)]
        started_s = self._clock.now()
        others = [self._helpers.submit(self._probe_part, part, access) for part in parts[1:]]
        try:
            self._probe_part(parts[0], access)
        finally:
            wait(others)
        for other in others:
            other.result()
        self._codecs.observe(KvCodec.RAW, len(target), self._clock.now() - started_s)

    def way_here(self) -> tuple[str, str]:
        """Return the two ends of a connection: the address of this host, and that of the peer."""
        with self._lock:
            if self._idle:
                return self._idle[-1].host_here, self._way.host
        return "", self._way.host

    def close(self) -> None:
        """See ``Link.close``: the transfers under way fail now."""
        with self._lock:
            self._is_closed = True
            sockets = [*self._idle, *self._in_use]
        for connection in sockets:
            connection.close()
        self._helpers.shutdown(wait=False)

    # On the transfer's thread ---------------------------------------------------------------------------------

    def _copy(self, transfer: Transfer, read: KvRead, digests: Sequence[bytes]) -> TransferState:
        if not read.blocks or not read.layers:
            return TransferState.DONE
        stopped = threading.Event()
        started_s = self._clock.now()
        check = partial(self._check, transfer, stopped, started_s + read.timeout_s)
        ask = _Ask(read, transfer.codec, check)
        parts = _share_out(read, digests, transfer.num_bytes, self._num_streams)
        bad = self._read_parts(ask, parts, stopped)
        if bad.blocks:
            transfer.num_repeated = len(bad.blocks)
            still_bad = self._read_part(ask, bad)
            if still_bad.blocks:
                raise corrupt(still_bad.blocks[0].block)
        self._codecs.observe(transfer.codec, transfer.num_bytes, self._clock.now() - started_s)
        return TransferState.DONE

    def _follow(self, transfer: Transfer, read: KvRead) -> TransferState:
        """Read what a step of the peer writes, over one connection, layer by layer; it travels as it is."""
        if not read.blocks or not read.layers:
            return TransferState.DONE
        check = partial(self._check, transfer, threading.Event(), transfer.started_s + read.timeout_s)
        ask = _Ask(read, KvCodec.RAW, check)
        blocks = read.sources
        connection, num_bytes = self._send_request(self._request(ask, _Part(blocks, ())), check)
        digests = LayerDigests(len(blocks))
        try:
            if num_bytes != len(blocks) * len(read.layers) * self._address.layout.layer_block_bytes:
                raise TransferError(f"the peer sends {num_bytes} bytes of KV behind its step, others were asked for")
            for layer in read.layers:
                came, places = self._receive_layer(connection, range(layer, layer + 1), blocks)
                if read.wants_digests:
                    digests.add(came, places)
        except BaseException:
            self._drop(connection)
            raise
        self._keep(connection)
        transfer.digests = digests.join() if read.wants_digests else b""
        return TransferState.DONE

    def _receive_layer(
        self, connection: KvSocket, layer: range, blocks: Sequence[SourceBlock]
    ) -> tuple[Blocks, Sequence[int]]:
        """Take over one layer of these blocks; return where its bytes are as they came, and which of them are whose."""
        pool = self._pool
        if self._forms.is_same:
            targets = [block.target for block in blocks]
            connection.receive(pieces(pool.data, pool.layout, layer, targets))
            return pool.blocks[layer.start : layer.stop], targets
        converted = ConvertedBlocks(self._forms, self._address.layout, pool, layer)
        room = converted.room_for(len(blocks))
        connection.receive([room])
        converted.take(room, blocks, ())
        return np.frombuffer(room, np.uint8).reshape(1, len(blocks), -1), range(len(blocks))

    def _codec(self, num_bytes: int) -> KvCodec:
        if self._dtype is KvTransferDtype.AUTO:
            return self._codecs.choose(num_bytes)
        return KvCodec(self._dtype.value)

    def _read_parts(self, ask: _Ask, parts: Sequence[_Part], stopped: threading.Event) -> _Part:
        """Read all parts at once, wait for all their ends, and return the blocks that came with another digest."""
        try:
            others = [self._helpers.submit(self._read_part, ask, part) for part in parts[1:]]
        except RuntimeError:
            raise TransferError("the link was closed: the peer has ended") from None
        try:
            bad = [self._read_part(ask, parts[0])]
            bad += [other.result() for other in others]
        finally:
            stopped.set()  # where one part failed, the others need not go on; nothing is written after this returns
            wait(others)
        stopped.clear()
        return _Part([pair for part in bad for pair in part.blocks], [one for part in bad for one in part.digests])

    def _read_part(self, ask: _Ask, part: _Part) -> _Part:
        read = ask.read
        connection, num_bytes = self._send_request(self._request(ask, part), ask.check)
        try:
            receive = self._receiver(ask, part, num_bytes)
            bad: list[int] = []
            for group in groups(len(part.blocks), self._address.layout.layer_block_bytes, len(read.layers)):
                came_bad = receive(connection, part.blocks[group], part.digests[group])
                bad += [group.start + index for index in came_bad]
        except BaseException:
            self._drop(connection)
            raise
        self._keep(connection)
        return _Part([part.blocks[index] for index in bad], [part.digests[index] for index in bad])

    def _receiver(self, ask: _Ask, part: _Part, num_bytes: int) -> _Receive:
        """Return what takes over a group; raise TransferError unless the announced bytes are those of the part."""
        layout, layers = self._pool.layout, ask.read.layers
        converted = ConvertedBlocks(self._forms, self._address.layout, self._pool, layers)
        coded = None
        if ask.codec is KvCodec.INT8:
            coded = CodedBlocks(self._pool, layers, None if self._forms.is_same else converted)
        expected = len(part.blocks) * len(layers) * self._address.layout.layer_block_bytes
        if coded is not None:
            expected = coded.num_bytes(len(part.blocks), has_digests=bool(part.digests))
        if num_bytes != expected:
            raise TransferError(f"the peer sends {num_bytes} bytes of KV, {expected} were asked for")

        def receive_raw(connection: KvSocket, blocks: Sequence[SourceBlock], digests: Sequence[bytes]) -> list[int]:
            targets = [block.target for block in blocks]
            connection.receive(pieces(self._pool.data, layout, layers, targets))
            return bad_blocks(self._pool.blocks, targets, digests)

        def receive_coded(connection: KvSocket, blocks: Sequence[SourceBlock], digests: Sequence[bytes]) -> list[int]:
            assert coded is not None, "the codec was asked for"
            room = coded.room_for(len(blocks), has_digests=bool(digests))
            connection.receive([room])
            return coded.decode(room, blocks, has_digests=bool(digests))

        def receive_converted(
            connection: KvSocket, blocks: Sequence[SourceBlock], digests: Sequence[bytes]
        ) -> list[int]:
            room = converted.room_for(len(blocks))
            connection.receive([room])
            return converted.take(room, blocks, digests)

        if coded is not None:
            return receive_coded
        return receive_raw if self._forms.is_same else receive_converted

    def _probe_part(self, target: memoryview, access: bytes) -> None:
        check = partial(self._check_open, self._clock.now() + PROBE_TIMEOUT_S)
        request = ReadRequest(
            access=access,
            blocks=(),
            first_layer=0,
            num_layers=0,
            block_bytes=self._address.layout.layer_block_bytes,
            probe_bytes=len(target),
        )
        connection, num_bytes = self._send_request(request, check)
        try:
            if num_bytes != len(target):
                raise TransferError(f"the peer sends {num_bytes} bytes, {len(target)} were asked for")
            connection.receive([target])
        except BaseException:
            self._drop(connection)
            raise
        self._keep(connection)

    def _request(self, ask: _Ask, part: _Part) -> ReadRequest:
        return ReadRequest(
            access=ask.read.access,
            blocks=tuple(block.block for block in part.blocks),
            first_layer=ask.read.layers.start,
            num_layers=len(ask.read.layers),
            block_bytes=self._address.layout.layer_block_bytes,
            codec=ask.codec,
            digests=b"" if ask.codec is KvCodec.RAW else b"".join(part.digests),
            behind_step=ask.read.behind_step,
        )

    def _send_request(self, asked: ReadRequest, check: Callable[[], None]) -> tuple[KvSocket, int]:
        """Return a connection on which what was asked for comes, and the number of its bytes."""
        request = encode_frame(asked)
        while True:
            connection, is_new = self._connection(check)
            try:
                reply = _exchange(connection, request)
            except TransferError:
                self._drop(connection)
                if is_new:
                    raise
                check()  # a kept connection may have ended meanwhile: try the next, then a new one
                continue
            if reply.failure:
                self._drop(connection)
                raise TransferError(f"{connection.peer} refused: {reply.failure}")
            return connection, reply.num_bytes

    def _connection(self, check: Callable[[], None]) -> tuple[KvSocket, bool]:
        """Return a connection, and whether it is new."""
        check()
        with self._lock:
            if self._idle:
                connection = self._idle.pop()
                self._in_use.add(connection)
                connection.check = check
                return connection, False
        connection = KvSocket.connect(self._way.host, self._way.port, self._clock)
        with self._lock:
            self._in_use.add(connection)
        connection.check = check
        try:
            connection.send([memoryview(hello(self._address.incarnation))])
            reply = decode_reply(connection.receive_frame(MAX_REPLY_BYTES))
            if reply.failure:
                raise TransferError(f"{connection.peer} refused: {reply.failure}")
        except BaseException:
            self._drop(connection)
            raise
        return connection, True

    def _keep(self, connection: KvSocket) -> None:
        with self._lock:
            self._in_use.discard(connection)
            if not self._is_closed:
                self._idle.append(connection)
                return
        connection.close()

    def _drop(self, connection: KvSocket) -> None:
        with self._lock:
            self._in_use.discard(connection)
        connection.close()

    def _check_open(self, until_s: float) -> None:
        if self._is_closed:
            raise TransferError("the link was closed: the peer has ended")
        if self._clock.now() >= until_s:
            raise TransferError(f"the link was not measured within {PROBE_TIMEOUT_S:g} s")

    def _check(self, transfer: Transfer, stopped: threading.Event, until_s: float) -> None:
        if self._is_closed:
            raise TransferError("the link was closed: the peer has ended")
        if stopped.is_set() and not transfer.is_cancelled:
            raise TransferError("another part of the transfer failed")
        transfer.check(until_s)


def _exchange(connection: KvSocket, request: bytes) -> Reply:
    connection.send_frame(request)
    return decode_reply(connection.receive_frame(MAX_REPLY_BYTES))


def _share_out(read: KvRead, digests: Sequence[bytes], num_bytes: int, num_streams: int) -> list[_Part]:
    """Cut a read into parts of about equal size, one for each connection that is worth it."""
    blocks = read.sources
    count = max(1, min(num_streams, num_bytes // MIN_STREAM_BYTES, len(blocks)))
    size = -(-len(blocks) // count)
    return [_Part(blocks[start : start + size], digests[start : start + size]) for start in range(0, len(blocks), size)]
