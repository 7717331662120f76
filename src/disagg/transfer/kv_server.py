"""What an instance shows of its KV pool to other hosts: a TCP port from which blocks are read with a capability."""

import logging
import socket
import threading
from functools import cached_property, partial
from typing import Final

from disagg.base.clock import Clock
from disagg.base.errors import ConfigurationError, ProtocolError, TransferError
from disagg.costs.links import KvCodec
from disagg.transfer.address import TcpWay
from disagg.transfer.coded_blocks import CodedBlocks
from disagg.transfer.digests import DIGEST_BYTES, split_digests
from disagg.transfer.grants import Grant, Grants
from disagg.transfer.kv_socket import KvSocket
from disagg.transfer.pool import KvPool
from disagg.transfer.wire import (
    HELLO,
    MAX_REQUEST_BYTES,
    ReadRequest,
    Reply,
    decode_request,
    encode_frame,
    groups,
    pieces,
    why_not_welcome,
)

MAX_CONNECTIONS: Final = 128
STRANGER_S: Final = 10.0
"""What a connection gets to show its first capability."""
IDLE_S: Final = 300.0
"""What it gets afterwards between two requests; a reader opens another when it needs one."""

_BACKLOG: Final = 128
_FILLER_BYTES: Final = 8 << 20
"""More than the caches that one core has for itself."""
_RETRY_S: Final = 0.5

logger = logging.getLogger(__name__)


class KvServer:
    """Serves one pool from threads, one for each connection, until ``close``."""

    def __init__(self, pool: KvPool, grants: Grants, host: str, clock: Clock) -> None:
        """Listen on a free port of ``host``; raise ConfigurationError when that is impossible."""
        self._pool = pool
        self._grants = grants
        self._clock = clock
        self._connections: set[KvSocket] = set()
        self._threads: set[threading.Thread] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        try:
            self._listener = socket.create_server((host, 0), family=_family(host), backlog=_BACKLOG)
        except OSError as error:
            raise ConfigurationError(
                f"cannot listen for readers of KV blocks on {host}: {error}; give an address of this host (--kv-host)"
            ) from error
        self.way = TcpWay(host=host, port=self._listener.getsockname()[1])
        self._acceptor = threading.Thread(target=self._accept, name="kv-accept", daemon=True)
        self._acceptor.start()

    @property
    def _is_closing(self) -> bool:
        return self._closed.is_set()

    def close(self) -> None:
        """End all connections and wait for their threads. A second call does nothing."""
        with self._lock:
            self._closed.set()
            connections, threads = list(self._connections), list(self._threads)
        try:
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the acceptor, which ``close`` alone does not
        except OSError:
            pass
        self._listener.close()
        for connection in connections:
            connection.close()
        for thread in (self._acceptor, *threads):
            thread.join()

    def _accept(self) -> None:
        while not self._is_closing:
            try:
                accepted, _ = self._listener.accept()
                connection = KvSocket(accepted, self._clock)
                try:
                    self._begin(connection)
                except BaseException:
                    connection.close()
                    raise
            except (OSError, RuntimeError, MemoryError) as error:  # what no thread can be started for is a RuntimeError
                if not self._is_closing:
                    logger.error("a reader of KV blocks could not connect: %s", error)
                    self._closed.wait(_RETRY_S)  # descriptors, threads or memory may be short

    def _begin(self, connection: KvSocket) -> None:
        """Serve a reader in a thread of its own, unless there are too many. Raises where no thread can be started."""
        thread = threading.Thread(target=self._serve, args=(connection,), name="kv-serve", daemon=True)
        with self._lock:
            is_full = self._is_closing or len(self._connections) >= MAX_CONNECTIONS
            if not is_full:
                thread.start()
                self._connections.add(connection)
                self._threads.add(thread)
        if is_full:
            logger.warning("a reader of KV blocks (%s) was turned away: there are too many", connection.peer)
            connection.close()

    def _serve(self, connection: KvSocket) -> None:
        try:
            if self._welcome(connection):
                self._answer_all(connection)
        except TransferError as error:
            logger.debug("a reader of KV blocks left: %s", error)
        except Exception:
            logger.exception("serving KV blocks to %s failed", connection.peer)
        finally:
            connection.close()
            with self._lock:
                self._connections.discard(connection)
                self._threads.discard(threading.current_thread())

    def _welcome(self, connection: KvSocket) -> bool:
        until_s = self._clock.now() + STRANGER_S
        connection.check = partial(self._end_after, until_s, "did not greet")
        failure = why_not_welcome(connection.receive_bytes(HELLO.size), self._pool.incarnation)
        connection.check = lambda: None
        connection.send_frame(encode_frame(Reply(failure=failure)))
        return not failure

    def _answer_all(self, connection: KvSocket) -> None:
        patience_s = STRANGER_S
        while connection.wait_for_data(patience_s):
            connection.check = partial(self._end_after, self._clock.now() + STRANGER_S, "did not finish its request")
            request = decode_request(connection.receive_frame(MAX_REQUEST_BYTES))
            try:
                grant = self._permit(request)
            except ProtocolError as error:
                logger.warning("refused to send KV blocks to %s: %s", connection.peer, error)
                connection.check = lambda: None
                connection.send_frame(encode_frame(Reply(failure=str(error))))
                return
            connection.check = partial(self._end_after, grant.expires_s, "read longer than its capability lasts")
            self._send(connection, request)
            connection.check = lambda: None
            patience_s = IDLE_S

    def _permit(self, request: ReadRequest) -> Grant:
        """Return what a request was granted; raise ProtocolError when it asks for more."""
        grant = self._grants.check(request.access)
        layout = self._pool.layout
        if len(request.blocks) > len(grant.blocks) or not set(grant.blocks).issuperset(request.blocks):
            raise ProtocolError(f"blocks were asked for that {grant.request_id} does not have")
        if request.first_layer + request.num_layers > layout.num_layers:
            raise ProtocolError(f"this pool has {layout.num_layers} layers, others were asked for")
        if request.block_bytes != layout.layer_block_bytes:
            raise ProtocolError(
                f"a layer of a block has {layout.layer_block_bytes} bytes here, the reader expects "
                f"{request.block_bytes}: start both with the same model, dtype, block size and kernels"
            )
        if request.behind_step and (request.codec is not KvCodec.RAW or request.digests):
            raise ProtocolError("blocks that a step is still writing are read as they are, and have no digests yet")
        if len(request.digests) not in (0, DIGEST_BYTES * len(request.blocks)):
            raise ProtocolError(f"{len(request.digests)} bytes are not the digests of {len(request.blocks)} blocks")
        return grant

    def _send_probe(self, connection: KvSocket, num_bytes: int) -> None:
        """Send bytes that are nobody's."""
        connection.send_frame(encode_frame(Reply(num_bytes=num_bytes)))
        for start in range(0, num_bytes, _FILLER_BYTES):
            connection.send([self._filler[: num_bytes - start]])

    @cached_property
    def _filler(self) -> memoryview:
        return memoryview(b"\1" * _FILLER_BYTES)

    def _send(self, connection: KvSocket, request: ReadRequest) -> None:
        if request.probe_bytes:
            self._send_probe(connection, request.probe_bytes)
            return
        layout = self._pool.layout
        layers = range(request.first_layer, request.first_layer + request.num_layers)
        if request.behind_step:
            self._send_behind(connection, request, layers)
            return
        coded = CodedBlocks(self._pool, layers) if request.codec is KvCodec.INT8 else None
        digests = split_digests(request.digests, len(request.blocks))
        num_bytes = len(request.blocks) * len(layers) * layout.layer_block_bytes
        if coded is not None:
            num_bytes = coded.num_bytes(len(request.blocks), has_digests=bool(digests))
        connection.send_frame(encode_frame(Reply(num_bytes=num_bytes)))
        for group in groups(len(request.blocks), layout.layer_block_bytes, len(layers)):
            blocks = request.blocks[group]
            if coded is None:
                connection.send(pieces(self._pool.data, layout, layers, blocks))
            else:
                connection.send([coded.encode(blocks, digests[group])])

    def _send_behind(self, connection: KvSocket, request: ReadRequest, layers: range) -> None:
        """Send the layers that a step is writing, each as soon as it is there."""
        layout = self._pool.layout
        num_bytes = len(request.blocks) * len(layers) * layout.layer_block_bytes
        connection.send_frame(encode_frame(Reply(num_bytes=num_bytes)))
        for written in self._pool.progress.follow(request.behind_step, layers, connection.check):
            connection.send(pieces(self._pool.data, layout, written, request.blocks))

    def _end_after(self, until_s: float, what: str) -> None:
        if self._is_closing:
            raise TransferError("this instance ends")
        if self._clock.now() >= until_s:
            raise TransferError(f"the reader {what}")


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
