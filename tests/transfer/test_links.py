"""The link contract over every kind of link, and what is special to each."""

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from link_contract import CONTRACT, DEADLINE_S, Ended, Ends, grant_all, pairs, pattern, small_layout
from owner_process import PEER_LAYOUT, OwnerProcess

from disagg.base.clock import MonotonicClock
from disagg.base.errors import ProtocolError, TransferError
from disagg.base.ids import BlockId
from disagg.base.transfer_settings import KvLinkChoice, TransferSettings
from disagg.transfer.address import NixlWay, decode_address, encode_address
from disagg.transfer.link import KvRead, Transfer, TransferState
from disagg.transfer.links import Links, SharedBlocks
from disagg.transfer.nixl_agent import NixlAgent
from disagg.transfer.page_toucher import wait_until_touched
from disagg.transfer.pool import KvPool

LOCAL_LAYOUT = small_layout(num_blocks=8)


def in_one_process(stack: ExitStack, kv_link: KvLinkChoice) -> Ends:
    peer = KvPool(PEER_LAYOUT, "aa")
    np.frombuffer(peer.data, dtype=np.uint8)[:] = pattern(PEER_LAYOUT)
    owner = stack.enter_context(ExitStack())
    owner.callback(peer.close)
    shared = SharedBlocks(peer, TransferSettings(kv_link=kv_link), None, MonotonicClock(), owner)
    ends = connect(stack, shared.address, owner.close, grant_all(shared, PEER_LAYOUT, DEADLINE_S))
    ends.peer_pool = peer
    return ends


def shm_in_one_process(stack: ExitStack) -> Ends:
    return in_one_process(stack, KvLinkChoice.SHM)


def shm_between_processes(stack: ExitStack) -> Ends:
    owner = OwnerProcess("bb")
    stack.callback(owner.kill)
    return connect(stack, owner.address, owner.close_pool, owner.access)


def tcp_in_one_process(stack: ExitStack) -> Ends:
    return in_one_process(stack, KvLinkChoice.TCP)


def nixl_between_processes(stack: ExitStack) -> Ends:
    pytest.importorskip("nixl_cu12", reason="NIXL is not installed: pip install 'disagg[nixl]'")
    owner = OwnerProcess("bb", "nixl")
    stack.callback(owner.kill)
    return connect(stack, owner.address, owner.close_pool, owner.access)


def connect(stack: ExitStack, address: bytes, close_peer: Callable[[], None], access: bytes) -> Ends:
    pool = KvPool(LOCAL_LAYOUT, "cc")
    stack.callback(pool.close)
    thread = stack.enter_context(ThreadPoolExecutor(max_workers=1))
    is_nixl = isinstance(decode_address(address).ways[0], NixlWay)
    settings = TransferSettings(kv_link=KvLinkChoice.NIXL if is_nixl else KvLinkChoice.AUTO)
    nixl = NixlAgent(pool, "127.0.0.1") if is_nixl else None
    links = Links(pool, thread, MonotonicClock(), settings, maps_ahead=True, nixl=nixl)
    stack.callback(links.close)
    return Ends(links.open(address), pool, PEER_LAYOUT, close_peer, access)


LINKS = [shm_in_one_process, shm_between_processes, tcp_in_one_process, nixl_between_processes]


@pytest.fixture(params=LINKS, ids=lambda make: make.__name__)
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    with ExitStack() as stack:
        yield request.param(stack)


@pytest.mark.parametrize("clause", CONTRACT, ids=lambda clause: clause.__name__)
def test_contract(ends: Ends, clause: Callable[[Ends], None]) -> None:
    clause(ends)


@pytest.mark.parametrize("make", [shm_in_one_process, tcp_in_one_process], ids=lambda make: make.__name__)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_copies_land_exactly(make: Callable[[ExitStack], Ends], data: st.DataObject) -> None:
    targets = data.draw(st.lists(st.integers(0, 7), unique=True))
    sources = data.draw(st.lists(st.integers(0, 11), min_size=len(targets), max_size=len(targets)))
    first = data.draw(st.integers(0, 3))
    layers = range(first, data.draw(st.integers(first, 3)))
    with ExitStack() as stack:
        ends = make(stack)
        expected = ends.local.copy()
        for source, target in zip(sources, targets, strict=True):
            expected[layers.start : layers.stop, target] = ends.peer[layers.start : layers.stop, source]
        assert ends.read(pairs(*zip(sources, targets, strict=True)), layers).state is TransferState.DONE
        assert np.array_equal(ends.local, expected)


def test_a_fault_while_copying_ends_the_transfer_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    def copy() -> TransferState:
        raise IndexError("a fault of ours")

    ended = Ended()
    transfer = Transfer(0, MonotonicClock(), ended)
    transfer.run(copy)
    assert ended.wait() is transfer
    assert (transfer.state, transfer.failure) == (TransferState.FAILED, "IndexError: a fault of ours")
    assert "a fault of ours" in caplog.text


class TestLinks:
    @pytest.fixture
    def pool(self) -> Iterator[KvPool]:
        pool = KvPool(LOCAL_LAYOUT, "cc")
        yield pool
        pool.close()

    @pytest.fixture
    def links(self, pool: KvPool) -> Iterator[Links]:
        with ThreadPoolExecutor(max_workers=1) as thread:
            links = Links(pool, thread, MonotonicClock())
            yield links
            links.close()

    def test_a_link_is_opened_once_and_again_after_the_peer_was_closed(self, links: Links) -> None:
        peer = KvPool(PEER_LAYOUT, "aa")
        first = links.open(encode_address(peer.address()))
        assert links.open(encode_address(peer.address())) is first
        links.close_peer("bb")
        assert links.open(encode_address(peer.address())) is first
        links.close_peer("aa")
        assert links.open(encode_address(peer.address())) is not first
        peer.close()

    def test_closing_a_link_ends_what_maps_the_peers_pages(self) -> None:
        layout = small_layout(num_blocks=200_000)
        pool = KvPool(layout, "cc")
        peer = KvPool(layout, "aa")
        with ThreadPoolExecutor(max_workers=1) as thread:
            others = Links(pool, thread, MonotonicClock(), maps_ahead=True)
            others.open(encode_address(peer.address()))
            others.close()
            assert wait_until_touched(timeout_s=0.0)
        peer.close()
        pool.close()

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("num_layers", 4),
            ("num_kv_heads", 1),
            ("block_size", 6),
            ("head_dim", 8),
        ],
    )
    def test_another_layout_is_refused_by_the_name_of_its_field(self, links: Links, name: str, value: object) -> None:
        peer = KvPool(small_layout(num_blocks=12, **{name: value}), "aa")
        with pytest.raises(TransferError, match=f"differ in {name}"):
            links.open(encode_address(peer.address()))
        peer.close()

    def test_a_killed_peer_cannot_be_opened(self, links: Links) -> None:
        owner = OwnerProcess("bb")
        owner.kill()
        with pytest.raises(TransferError, match="cannot open the peer's KV pool"):
            links.open(owner.address)

    def test_what_was_mapped_before_the_peer_was_killed_can_still_be_read(self, links: Links, pool: KvPool) -> None:
        owner = OwnerProcess("bb")
        link = links.open(owner.address)
        owner.kill()
        ended = Ended()
        link.read(KvRead([(BlockId(3), BlockId(2))], range(3)), ended)
        assert ended.wait().state is TransferState.DONE
        expected = pattern(PEER_LAYOUT).reshape(3, 12, -1)[:, 3]
        received = np.frombuffer(pool.data, dtype=np.uint8).reshape(3, 8, -1)[:, 2]
        assert np.array_equal(received, expected)

    def test_a_read_from_a_frozen_peer_that_was_given_up_writes_nothing_when_the_peer_wakes(
        self, links: Links, pool: KvPool
    ) -> None:
        owner = OwnerProcess("bb", "tcp")
        link, blocks = links.open(owner.address), pairs((3, 2), (4, 5))
        owner.process.send_signal(signal.SIGSTOP)
        given_up = Ended()
        link.read(KvRead(blocks, range(3), access=owner.access, timeout_s=0.2), given_up)
        assert "took longer than the lease" in given_up.wait().failure
        before = bytes(pool.data)
        owner.process.send_signal(signal.SIGCONT)
        ended = Ended()
        link.read(KvRead(pairs((0, 0)), range(3), access=owner.access), ended)
        assert ended.wait().state is TransferState.DONE  # the peer is awake, and has answered what came before
        after = np.frombuffer(pool.data, dtype=np.uint8).reshape(3, 8, -1).copy()
        after[:, 0] = 0
        assert after.tobytes() == before
        owner.kill()

    def test_bytes_that_are_no_address_are_refused(self, links: Links) -> None:
        with pytest.raises(ProtocolError, match="malformed pool address"):
            links.open(b"\x93\x01\x02")
