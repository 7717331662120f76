"""The shared pool: its address, its protection, and what a peer finds when things are not as announced."""

import fcntl
import mmap
import os
import tempfile

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from link_contract import small_layout

from disagg.base.errors import ConfigurationError, DisaggError, ProtocolError, TransferError
from disagg.transfer.address import ADDRESS_VERSION, PoolAddress, ShmWay, decode_address, encode_address
from disagg.transfer.peer_pool import PeerPool
from disagg.transfer.pool import KvPool

LAYOUT = small_layout(num_blocks=4)


@pytest.fixture
def pool():
    pool = KvPool(LAYOUT, "0a")
    yield pool
    pool.close()


def open_peer(pool: KvPool, **changes: object) -> PeerPool:
    address = pool.address()
    way = msgspec.structs.replace(
        pool.shm_way, **{name: changes.pop(name) for name in ("pid", "fd") if name in changes}
    )
    return PeerPool(msgspec.structs.replace(address, **changes), way)


def test_a_peer_sees_what_the_owner_writes_and_cannot_write_itself(pool: KvPool) -> None:
    peer = open_peer(pool)
    pool.blocks[2, 3] = 17
    assert (peer.blocks[2, 3] == 17).all()
    assert not peer.blocks.flags.writeable


def mapped_bytes(address: int) -> int:
    """Return how much of the mapping at ``address`` this process has in its page tables."""
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            span = line.split()[0].split("-")
            if len(span) == 2 and int(span[0], 16) <= address < int(span[1], 16):
                return 1024 * int(next(line for line in smaps if line.startswith("Rss:")).split()[1])
    raise AssertionError(f"nothing is mapped at {address:#x}")


def test_touching_maps_pages_before_they_are_read() -> None:
    layout = small_layout(num_blocks=4096)
    pool = KvPool(layout, "0a")
    pool.blocks[:] = 3
    peer = open_peer(pool)
    before = mapped_bytes(peer.blocks.ctypes.data)
    peer.touch(layer=1, first_block=1024, num_blocks=2048)
    wanted = 2048 * layout.layer_block_bytes
    assert wanted <= mapped_bytes(peer.blocks.ctypes.data) - before < layout.total_bytes
    assert (peer.blocks == 3).all()
    pool.close()


def test_bytes_and_blocks_are_one_memory(pool: KvPool) -> None:
    data = np.frombuffer(pool.data, dtype=np.uint8)
    assert data.nbytes == LAYOUT.total_bytes == pool.blocks.nbytes
    data[LAYOUT.offset(layer=1, block=2)] = 5
    assert pool.blocks[1, 2].view(np.uint8)[0] == 5


@pytest.mark.parametrize("head_dim", [1, 2, 3, 6])
def test_every_block_size_has_a_word_to_copy_it_in(head_dim: int) -> None:
    layout = small_layout(num_blocks=2, head_dim=head_dim * 2, num_kv_heads=1)
    pool = KvPool(layout, "0a")
    assert pool.blocks.shape[:2] == (3, 2)
    assert pool.blocks.nbytes == layout.total_bytes
    pool.close()


def test_nobody_can_change_the_size_or_map_it_writable(pool: KvPool) -> None:
    way = pool.shm_way
    descriptor = os.open(f"/proc/{way.pid}/fd/{way.fd}", os.O_RDWR)
    with pytest.raises(PermissionError):
        os.ftruncate(descriptor, 0)
    with pytest.raises(PermissionError):
        mmap.mmap(descriptor, mmap.PAGESIZE, mmap.MAP_SHARED)
    os.close(descriptor)


def test_touching_keeps_the_contents(pool: KvPool) -> None:
    pool.blocks[1, 2] = 9
    for layer in range(LAYOUT.num_layers):
        pool.touch(layer, 1, 3)
    assert (pool.blocks[1, 2] == 9).all()


def test_views_outlive_the_pool() -> None:
    pool = KvPool(LAYOUT, "0a")
    blocks = pool.blocks
    pool.close()
    pool.close()
    blocks[0, 0] = 3
    assert (blocks[0, 0] == 3).all()


def test_a_closed_pool_is_recognised_by_who_mapped_it(pool: KvPool) -> None:
    peer = open_peer(pool)
    peer.check_alive()
    pool.close()
    with pytest.raises(TransferError, match="has ended"):
        peer.check_alive()


class TestNotAsAnnounced:
    def test_another_incarnation(self, pool: KvPool) -> None:
        with pytest.raises(TransferError, match="incarnation 0b"):
            open_peer(pool, incarnation="0b")

    def test_another_size(self, pool: KvPool) -> None:
        with pytest.raises(TransferError, match="were announced"):
            open_peer(pool, layout=small_layout(num_blocks=5))

    def test_another_layout_of_the_same_size(self, pool: KvPool) -> None:
        with pytest.raises(TransferError, match="has ended"):
            open_peer(pool, layout=small_layout(num_blocks=4, num_kv_heads=1, head_dim=12))

    def test_no_such_process_or_file(self, pool: KvPool) -> None:
        with pytest.raises(TransferError, match="cannot open"):
            open_peer(pool, fd=10**6)
        with pytest.raises(TransferError, match="cannot open"):
            open_peer(pool, pid=2**31 - 1)

    def test_a_file_that_is_no_pool_is_never_opened(self, pool: KvPool) -> None:
        with tempfile.TemporaryFile() as file, pytest.raises(TransferError, match="is no KV pool"):
            open_peer(pool, fd=file.fileno())

    def test_an_unsealed_file_is_refused(self, pool: KvPool) -> None:
        descriptor = os.memfd_create("disagg-kv", os.MFD_ALLOW_SEALING)
        os.ftruncate(descriptor, mmap.PAGESIZE + LAYOUT.total_bytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
        with pytest.raises(TransferError, match="not sealed"):
            open_peer(pool, fd=descriptor)
        os.close(descriptor)


def test_more_memory_than_an_address_space_is_refused_with_the_flag_to_change() -> None:
    with pytest.raises(ConfigurationError, match="lower --kv-memory"):
        KvPool(small_layout(num_blocks=1 << 60), "0a")


def test_an_address_survives_the_wire(pool: KvPool) -> None:
    address = decode_address(encode_address(pool.address()))
    assert address == pool.address()
    assert (address.layout, address.incarnation) == (LAYOUT, "0a")
    assert address.ways == (ShmWay(pid=os.getpid(), fd=pool.shm_way.fd),)


def test_another_version_is_refused(pool: KvPool) -> None:
    address = msgspec.structs.replace(pool.address(), version=1)
    with pytest.raises(ProtocolError, match="version 1"):
        decode_address(encode_address(address))


VALID = encode_address(
    PoolAddress(version=ADDRESS_VERSION, incarnation="0a", layout=LAYOUT, ways=(ShmWay(pid=2**22, fd=3),))
)


@given(st.binary(max_size=200))
@example(b"")
@example(b"\x00" * 5000)
def test_garbage_is_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_address(data)


@given(st.integers(0, len(VALID) - 1), st.binary(min_size=1, max_size=9))
def test_a_damaged_address_is_an_error_of_ours_and_never_a_crash(position: int, damage: bytes) -> None:
    data = VALID[:position] + damage + VALID[position + len(damage) :]
    try:
        address = decode_address(data)
        for way in address.ways:
            if isinstance(way, ShmWay):
                PeerPool(address, way)
    except DisaggError:
        return
    raise AssertionError("a pool of a process that does not exist was opened")
