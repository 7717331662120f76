"""What every link must do, as functions. ``test_links.py`` runs each of them over each kind of link."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from disagg.base.clock import MonotonicClock
from disagg.base.errors import TransferError
from disagg.base.ids import BlockId, Epoch, InstanceId, RequestId
from disagg.base.messages import KvOffer
from disagg.cache.layout import KvDtype, KvFormat, KvLayout
from disagg.transfer.digests import join_digests
from disagg.transfer.link import KvRead, Link, Transfer, TransferState
from disagg.transfer.link_probe import measure_link
from disagg.transfer.links import SharedBlocks
from disagg.transfer.pool import KvPool
from disagg.transfer.source_blocks import BlockPair

DEADLINE_S = 30.0


def small_layout(num_blocks: int, **changes: object) -> KvLayout:
    fields: dict[str, object] = {
        "num_layers": 3,
        "num_blocks": num_blocks,
        "num_kv_heads": 2,
        "block_size": 4,
        "head_dim": 6,
        "dtype": KvDtype.BFLOAT16,
        "format": KvFormat.INTERLEAVED,
    }
    return KvLayout(**{**fields, **changes})  # type: ignore[arg-type]


def pattern(layout: KvLayout) -> np.ndarray:
    """Bytes that differ from block to block, as a peer's pool is filled with."""
    return np.random.default_rng(7).integers(0, 256, layout.total_bytes, dtype=np.uint8)


def pairs(*blocks: tuple[int, int]) -> list[BlockPair]:
    return [(BlockId(source), BlockId(target)) for source, target in blocks]


def grant_all(shared: SharedBlocks, layout: KvLayout, lease_s: float) -> bytes:
    """The capability to read every block of a pool."""
    offer = KvOffer(
        request_id=RequestId("all"),
        epoch=Epoch(1),
        source=InstanceId("peer"),
        incarnation="aa",
        num_tokens=1,
        block_size=layout.block_size,
        block_ids=tuple(BlockId(block) for block in range(layout.num_blocks)),
        lease_s=lease_s,
        pool=shared.address,
    )
    return shared.seal(offer).access


@dataclass
class Ended:
    """Waits for a transfer's end and counts how often it was told."""

    transfers: list[Transfer] = field(default_factory=list)
    event: threading.Event = field(default_factory=threading.Event)

    def __call__(self, transfer: Transfer) -> None:
        self.transfers.append(transfer)
        self.event.set()

    def wait(self) -> Transfer:
        assert self.event.wait(DEADLINE_S), "the transfer did not end"
        return self.transfers[0]


@dataclass
class Ends:
    """Both ends of one link: ``peer`` is what the peer's pool holds, ``close_peer`` ends the peer's instance."""

    link: Link
    pool: KvPool
    peer_layout: KvLayout
    close_peer: Callable[[], None]
    access: bytes = b""
    peer_pool: KvPool | None = None
    """Where the peer is in this process."""

    def __post_init__(self) -> None:
        self.peer = pattern(self.peer_layout).reshape(self.peer_layout.num_layers, self.peer_layout.num_blocks, -1)

    @property
    def local(self) -> np.ndarray:
        layout = self.pool.layout
        return np.frombuffer(self.pool.data, dtype=np.uint8).reshape(layout.num_layers, layout.num_blocks, -1)

    def start(
        self, blocks: list[BlockPair], ended: Ended, layers: range | None = None, digests: bytes = b""
    ) -> Transfer:
        wanted = range(self.pool.layout.num_layers) if layers is None else layers
        return self.link.read(KvRead(blocks, wanted, digests=digests, access=self.access, timeout_s=DEADLINE_S), ended)

    def read(self, blocks: list[BlockPair], layers: range | None = None, digests: bytes = b"") -> Transfer:
        ended = Ended()
        self.start(blocks, ended, layers, digests)
        return ended.wait()

    def digests(self, *sources: int) -> bytes:
        """What these blocks of the peer were offered with."""
        return join_digests(self.peer, [BlockId(source) for source in sources])


def copies_land_exactly_and_nothing_else_is_written(ends: Ends) -> None:
    ends.local[:] = 0xEE
    blocks = pairs((0, 5), (1, 6), (2, 7), (9, 0), (4, 3), (3, 4))
    expected = ends.local.copy()
    for source, target in blocks:
        expected[:, target] = ends.peer[:, source]
    transfer = ends.read(blocks)
    assert transfer.state is TransferState.DONE, transfer.failure
    assert transfer.num_bytes == 6 * ends.pool.layout.block_bytes
    assert np.array_equal(ends.local, expected)


def only_the_wanted_layers_are_copied(ends: Ends) -> None:
    ends.local[:] = 0
    transfer = ends.read(pairs((8, 1)), range(1, 2))
    assert transfer.num_bytes == ends.pool.layout.layer_block_bytes
    assert np.array_equal(ends.local[1, 1], ends.peer[1, 8])
    assert not ends.local[0].any()
    assert not ends.local[2].any()


def an_empty_read_is_done(ends: Ends) -> None:
    assert ends.read([]).state is TransferState.DONE


def the_end_is_told_once_with_its_time(ends: Ends) -> None:
    ended = Ended()
    started = ends.start(pairs((0, 0)), ended)
    assert ended.wait() is started
    assert started.ended_s >= started.started_s
    assert ends.read(pairs((1, 1))).state is TransferState.DONE  # the link has moved on
    assert len(ended.transfers) == 1


def blocks_that_do_not_exist_are_refused(ends: Ends) -> None:
    for blocks, words in (
        (pairs((0, 0), (ends.peer_layout.num_blocks, 1)), "the peer has no KV block"),
        (pairs((0, ends.pool.layout.num_blocks)), "there is no KV block"),
        (pairs((-1, 0)), "the peer has no KV block -1"),
        (pairs((0, -1)), "there is no KV block -1"),
    ):
        with pytest.raises(TransferError, match=words):
            ends.start(blocks, Ended())
    for layers in (range(4), range(-1, 2), range(0, 3, 2)):
        with pytest.raises(TransferError, match="layers"):
            ends.start(pairs((0, 0)), Ended(), layers)


def a_cancelled_read_ends_and_says_so(ends: Ends) -> None:
    """It may be done before the cancellation reaches it; what counts is that it ends, and that it knows how."""
    ended = Ended()
    ends.start(pairs((0, 0), (2, 1)), ended).cancel()
    assert ended.wait().state in (TransferState.CANCELLED, TransferState.DONE)


def reads_started_before_close_still_end(ends: Ends) -> None:
    ended = Ended()
    ends.start(pairs((0, 0)), ended)
    ends.link.close()
    assert ended.wait().state in (TransferState.DONE, TransferState.FAILED)


def a_probe_fills_all_of_its_memory_and_touches_no_block(ends: Ends) -> None:
    ends.local[:] = 0xEE
    memory = bytearray(2 * ends.peer_layout.total_bytes + 3)
    ends.link.probe(memoryview(memory), ends.access)
    assert any(memory[-3:])
    assert (ends.local == 0xEE).all()


def a_link_is_measured_beside_its_limit(ends: Ends) -> None:
    figure = measure_link(ends.link, ends.access, "as a test", MonotonicClock())
    assert (figure.link, figure.why, figure.failure) == (ends.link.kind.value, "as a test", "")
    assert min(figure.bytes_per_s, figure.latency_s, figure.limit_bytes_per_s) > 0


def a_peer_that_ended_fails_the_read_in_words(ends: Ends) -> None:
    ends.close_peer()
    transfer = ends.read(pairs((0, 0)))
    assert transfer.state is TransferState.FAILED
    assert "has ended" in transfer.failure


def blocks_that_come_as_they_were_offered_are_read_once(ends: Ends) -> None:
    transfer = ends.read(pairs((0, 5), (9, 2)), digests=ends.digests(0, 9))
    assert (transfer.state, transfer.num_repeated) == (TransferState.DONE, 0), transfer.failure
    assert np.array_equal(ends.local[:, 2], ends.peer[:, 9])


def a_block_that_comes_otherwise_is_read_again_and_then_fails_the_read(ends: Ends) -> None:
    transfer = ends.read(pairs((0, 5), (9, 2), (4, 4)), digests=ends.digests(0, 8, 4))
    assert transfer.state is TransferState.FAILED
    assert "KV block 9 of the peer came twice with another digest" in transfer.failure
    assert transfer.num_repeated == 1
    assert ends.read(pairs((4, 4)), digests=ends.digests(4)).state is TransferState.DONE  # the link goes on


def digests_that_cannot_be_checked_are_refused(ends: Ends) -> None:
    with pytest.raises(TransferError, match="are not the digests of 2 blocks"):
        ends.start(pairs((0, 0), (1, 1)), Ended(), digests=ends.digests(0))
    with pytest.raises(TransferError, match="over all 3 layers"):
        ends.start(pairs((0, 0)), Ended(), range(1, 2), ends.digests(0))


CONTRACT: tuple[Callable[[Ends], None], ...] = (
    copies_land_exactly_and_nothing_else_is_written,
    only_the_wanted_layers_are_copied,
    an_empty_read_is_done,
    the_end_is_told_once_with_its_time,
    blocks_that_do_not_exist_are_refused,
    a_cancelled_read_ends_and_says_so,
    reads_started_before_close_still_end,
    blocks_that_come_as_they_were_offered_are_read_once,
    a_block_that_comes_otherwise_is_read_again_and_then_fails_the_read,
    digests_that_cannot_be_checked_are_refused,
    a_probe_fills_all_of_its_memory_and_touches_no_block,
    a_link_is_measured_beside_its_limit,
    a_peer_that_ended_fails_the_read_in_words,
)
