"""The TCP side of a pool: who is let in, what is refused, what a reader meets when its peer is slow, gone or mad."""

import errno
import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from link_contract import DEADLINE_S, Ended, Ends, pairs, pattern, small_layout
from relay import Relay

from disagg.base.clock import MonotonicClock
from disagg.base.errors import ConfigurationError, ProtocolError, TransferError
from disagg.base.ids import BlockId, Epoch, RequestId
from disagg.base.transfer_settings import KvLinkChoice, TransferSettings
from disagg.transfer.address import TcpWay, encode_address
from disagg.transfer.grants import Grants
from disagg.transfer.kv_server import MAX_CONNECTIONS, KvServer
from disagg.transfer.kv_socket import KvSocket
from disagg.transfer.link import KvRead, TransferState
from disagg.transfer.links import Links
from disagg.transfer.pool import KvPool
from disagg.transfer.tcp_link import TcpLink
from disagg.transfer.wire import MAX_REPLY_BYTES, ReadRequest, Reply, decode_reply, encode_frame, groups, hello

LAYOUT = small_layout(num_blocks=12)
BIG = small_layout(num_blocks=256, num_kv_heads=64, block_size=16, head_dim=16)
"""64 KiB for each block of each layer."""


class HandClock:
    """Stands until a test moves it."""

    def __init__(self) -> None:
        self.time_s = 100.0

    def now(self) -> float:
        return self.time_s


class Served:
    """A pool behind a KvServer."""

    def __init__(self, stack: ExitStack, layout=LAYOUT) -> None:
        self.pool = KvPool(layout, "aa")
        stack.callback(self.pool.close)
        np.frombuffer(self.pool.data, dtype=np.uint8)[:] = pattern(layout)
        self.clock = HandClock()
        self.grants = Grants(self.clock)
        self.server = KvServer(self.pool, self.grants, "127.0.0.1", self.clock)
        stack.callback(self.server.close)
        self.address = encode_address(self.pool.address(self.server.way))

    def grant(self, *blocks: int, duration_s: float = 60.0) -> bytes:
        return self.grants.issue(RequestId("r"), Epoch(1), tuple(map(BlockId, blocks)), duration_s)

    def connect(self) -> KvSocket:
        connection = KvSocket.connect("127.0.0.1", self.server.way.port, MonotonicClock())
        connection.send([memoryview(hello("aa"))])
        assert decode_reply(connection.receive_frame(MAX_REPLY_BYTES)) == Reply()
        return connection

    def ask(self, access: bytes, *blocks: int, **changes: object) -> Reply:
        fields = {"first_layer": 0, "num_layers": 3, "block_bytes": self.pool.layout.layer_block_bytes, **changes}
        request = ReadRequest(access=access, blocks=tuple(map(BlockId, blocks)), **fields)  # type: ignore[arg-type]
        connection = self.connect()
        connection.send_frame(encode_frame(request))
        reply = decode_reply(connection.receive_frame(MAX_REPLY_BYTES))
        connection.close()
        return reply

    def link(self, stack: ExitStack, address: bytes | None = None) -> Ends:
        local = KvPool(self.pool.layout, "cc")
        stack.callback(local.close)
        threads = stack.enter_context(ThreadPoolExecutor(max_workers=2))
        links = Links(local, threads, MonotonicClock())
        stack.callback(links.close)
        access = self.grant(*range(self.pool.layout.num_blocks))
        return Ends(links.open(address or self.address), local, self.pool.layout, self.server.close, access)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def served(stack: ExitStack) -> Served:
    return Served(stack)


class TestCapabilities:
    def test_granted_blocks_are_sent(self, served: Served) -> None:
        reply = served.ask(served.grant(3, 4), 4)
        assert (reply.num_bytes, reply.failure) == (LAYOUT.block_bytes, "")

    def test_a_capability_of_another_life_is_refused(self, served: Served) -> None:
        other = Grants(served.clock).issue(RequestId("r"), Epoch(1), (BlockId(3),), 60.0)
        assert "not one of this instance" in served.ask(other, 3).failure

    @pytest.mark.parametrize("position", [0, 31, 32, 40, -1])
    def test_a_changed_capability_is_refused(self, served: Served, position: int) -> None:
        access = bytearray(served.grant(3))
        access[position] ^= 1
        assert "not one of this instance" in served.ask(bytes(access), 3).failure

    def test_a_capability_ends(self, served: Served) -> None:
        access = served.grant(3, duration_s=5.0)
        assert served.ask(access, 3).failure == ""
        served.clock.time_s += 5.0
        assert "has ended" in served.ask(access, 3).failure
        with pytest.raises(ProtocolError, match="has ended"):
            served.grants.check(access)

    def test_other_blocks_are_refused(self, served: Served) -> None:
        assert "that r does not have" in served.ask(served.grant(3, 4), 3, 5).failure
        assert "that r does not have" in served.ask(served.grant(3), 3, 3).failure  # nor more often than once

    def test_other_shapes_are_refused(self, served: Served) -> None:
        access = served.grant(3)
        assert "3 layers" in served.ask(access, 3, first_layer=1).failure
        assert "same model" in served.ask(access, 3, block_bytes=8).failure


def test_readers_are_served_again_after_one_for_whom_no_thread_could_start(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "kv-serve":
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with socket.create_connection(("127.0.0.1", served.server.way.port)) as reader:
            reader.settimeout(DEADLINE_S)
            assert reader.recv(1) == b""
    assert not served.ask(served.grant(1, 2), 1, 2).failure


class TestStrangers:
    def test_another_incarnation_has_ended(self, served: Served) -> None:
        connection = KvSocket.connect("127.0.0.1", served.server.way.port, MonotonicClock())
        connection.send([memoryview(hello("bb"))])
        reply = decode_reply(connection.receive_frame(MAX_REPLY_BYTES))
        assert "(incarnation bb) has ended" in reply.failure
        connection.close()

    def test_a_length_over_the_limit_is_never_allocated(self, served: Served) -> None:
        connection = served.connect()
        connection.send([memoryview(struct.pack("<I", 2**32 - 1))])
        assert not connection.wait_for_data(DEADLINE_S)  # it was closed
        connection.close()

    def test_more_readers_than_there_is_room_for_are_turned_away(self, served: Served, stack: ExitStack) -> None:
        way = served.server.way
        for _ in range(MAX_CONNECTIONS):
            stack.callback(served.connect().close)
        late = stack.enter_context(socket.create_connection((way.host, way.port)))
        late.settimeout(DEADLINE_S)
        assert late.recv(1) == b""

    def test_an_address_of_another_host_is_refused_with_the_flag_to_change(self, served: Served) -> None:
        with pytest.raises(ConfigurationError, match="--kv-host"):
            KvServer(served.pool, served.grants, "192.0.2.1", MonotonicClock())

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_whatever_is_sent_the_server_goes_on(self, served: Served, data: st.DataObject) -> None:
        request = encode_frame(
            ReadRequest(access=served.grant(1), blocks=(BlockId(1),), first_layer=0, num_layers=3, block_bytes=96)
        )
        valid = hello("aa") + struct.pack("<I", len(request)) + request
        position = data.draw(st.integers(0, len(valid)))
        damage = data.draw(st.binary(max_size=40))
        with socket.create_connection(("127.0.0.1", served.server.way.port)) as stranger:
            stranger.settimeout(DEADLINE_S)
            try:
                stranger.sendall(valid[:position] + damage + valid[position + len(damage) :])
                stranger.shutdown(socket.SHUT_WR)
                while stranger.recv(1 << 16):
                    pass
            except ConnectionError:
                pass  # it was closed with bytes unread
            except OSError as error:
                if error.errno != errno.ENOTCONN:  # the same, before ``shutdown``
                    raise
        if data.draw(st.integers(0, 20)) == 0:
            assert served.ask(served.grant(2), 2).failure == ""


def silent_address(served: Served, stack: ExitStack) -> bytes:
    """Where a peer seems to be of which nothing arrives."""
    silent = threading.Event()

    def hold(start: int, data: bytes) -> bytes:
        silent.wait()
        return data

    relay = stack.enter_context(Relay(served.address, hold))
    stack.callback(silent.set)
    return relay.address


class TestReader:
    def test_a_large_read_is_shared_out_to_several_connections(self, stack: ExitStack) -> None:
        served = Served(stack, BIG)
        ends = served.link(stack)
        order = np.random.default_rng(3).permutation(BIG.num_blocks).tolist()
        blocks = pairs(*((block, BIG.num_blocks - 1 - block) for block in order))
        assert ends.read(blocks, digests=ends.digests(*order)).state is TransferState.DONE
        assert np.array_equal(ends.local[:, ::-1], ends.peer)
        assert isinstance(ends.link, TcpLink)
        assert len(ends.link._idle) == 2

    def test_a_cut_in_the_middle_fails_in_words_and_the_next_read_works(self, stack: ExitStack) -> None:
        served = Served(stack, BIG)
        healthy = threading.Event()

        def cut(start: int, data: bytes) -> bytes | None:
            return data if healthy.is_set() or start < 1 << 20 else None

        relay = stack.enter_context(Relay(served.address, cut))
        ends = served.link(stack, relay.address)
        blocks = pairs(*((block, block) for block in range(BIG.num_blocks)))
        transfer = ends.read(blocks)
        assert transfer.state is TransferState.FAILED
        assert "closed the connection" in transfer.failure or "broke" in transfer.failure
        healthy.set()
        assert ends.read(blocks).state is TransferState.DONE
        assert np.array_equal(ends.local, ends.peer)

    def test_a_kept_connection_that_ended_meanwhile_is_replaced(self, served: Served, stack: ExitStack) -> None:
        ends = served.link(stack)
        assert ends.read(pairs((1, 1))).state is TransferState.DONE
        assert isinstance(ends.link, TcpLink)
        for connection in ends.link._idle:
            connection._socket.shutdown(socket.SHUT_RDWR)
        assert ends.read(pairs((2, 2))).state is TransferState.DONE

    def test_a_silent_peer_is_given_up_at_the_deadline(self, served: Served, stack: ExitStack) -> None:
        ends, ended = served.link(stack, silent_address(served, stack)), Ended()
        ends.link.read(KvRead(pairs((1, 1)), range(3), access=ends.access, timeout_s=0.1), ended)
        assert "took longer than the lease" in ended.wait().failure

    def test_cancelling_a_read_from_a_silent_peer_ends_it(self, served: Served, stack: ExitStack) -> None:
        ends, ended = served.link(stack, silent_address(served, stack)), Ended()
        ends.start(pairs((1, 1)), ended).cancel()
        assert ended.wait().state is TransferState.CANCELLED

    def test_nobody_there(self, served: Served, stack: ExitStack) -> None:
        port = served.server.way.port
        served.server.close()
        ends = served.link(stack)
        transfer = ends.read(pairs((1, 1)))
        assert f"has ended: nobody listens at 127.0.0.1:{port}" in transfer.failure

    def test_way_without_a_server_is_not_tried_where_only_shared_memory_may_be_used(self, stack: ExitStack) -> None:
        local = KvPool(LAYOUT, "cc")
        stack.callback(local.close)
        threads = stack.enter_context(ThreadPoolExecutor(max_workers=1))
        links = Links(local, threads, MonotonicClock(), TransferSettings(kv_link=KvLinkChoice.SHM))
        remote = KvPool(LAYOUT, "aa")
        stack.callback(remote.close)
        address = encode_address(remote.address(TcpWay(host="127.0.0.1", port=1)))
        with pytest.raises(TransferError, match="prefill-0 can be read over tcp, this instance takes shm"):
            links.open(address, "prefill-0")


@given(st.integers(0, 300), st.integers(1, 1 << 22), st.integers(0, 40))
def test_groups_cover_all_blocks_in_order(num_blocks: int, layer_block_bytes: int, num_layers: int) -> None:
    covered = [
        index for group in groups(num_blocks, layer_block_bytes, num_layers) for index in range(num_blocks)[group]
    ]
    assert covered == list(range(num_blocks))
