"""Blocks behind every sliding window travel without their sliding layers, over every link and in every form."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import pytest
from link_contract import DEADLINE_S, Ended, pairs, small_layout

from disagg.base.clock import MonotonicClock
from disagg.base.errors import TransferError
from disagg.base.ids import BlockId, Epoch, InstanceId, RequestId
from disagg.base.messages import KvOffer
from disagg.base.transfer_settings import KvLinkChoice, KvTransferDtype, TransferSettings
from disagg.cache.layout import KvDtype, KvFormat, KvLayout, first_seen_block
from disagg.transfer.block_forms import check_convertible
from disagg.transfer.link import KvRead, Transfer, TransferState
from disagg.transfer.links import Links
from disagg.transfer.pool import KvPool
from disagg.transfer.shared_blocks import SharedBlocks

LAYOUT = small_layout(num_blocks=12, num_window_layers=2, window=9, dtype=KvDtype.FLOAT32)
SOURCES, OUTSIDE = (7, 2, 3, 9), 3
COPIES = pairs((7, 0), (2, 4), (3, 5), (9, 1))
FORMS = {
    "shm": (KvLinkChoice.SHM, KvTransferDtype.RAW, LAYOUT.format),
    "shm converted": (KvLinkChoice.SHM, KvTransferDtype.RAW, KvFormat.TOKEN_MAJOR),
    "tcp": (KvLinkChoice.TCP, KvTransferDtype.RAW, LAYOUT.format),
    "tcp converted": (KvLinkChoice.TCP, KvTransferDtype.RAW, KvFormat.TOKEN_MAJOR),
    "tcp int8": (KvLinkChoice.TCP, KvTransferDtype.INT8, LAYOUT.format),
}


@dataclass
class Pair:
    peer: KvPool
    pool: KvPool
    links: Links
    shared: SharedBlocks

    def offer(self) -> KvOffer:
        offer = KvOffer(
            request_id=RequestId("a"),
            epoch=Epoch(1),
            source=InstanceId("peer"),
            incarnation="aa",
            num_tokens=16,
            block_ids=tuple(map(BlockId, SOURCES)),
            lease_s=DEADLINE_S,
            pool=self.shared.address,
            num_outside_window=OUTSIDE,
        )
        return self.shared.seal(offer)

    def read(self, offer: KvOffer, num_outside: int) -> Transfer:
        ended = Ended()
        read = KvRead(
            COPIES, range(3), offer.digests, offer.access, timeout_s=DEADLINE_S, num_outside_window=num_outside
        )
        self.links.open(offer.pool).read(read, ended)
        return ended.wait()

    @property
    def received(self) -> np.ndarray:
        return np.frombuffer(self.pool.data, np.uint8).reshape(3, self.pool.layout.num_blocks, -1)


@pytest.fixture(params=FORMS.values(), ids=FORMS)
def ends(request: pytest.FixtureRequest) -> Iterator[Pair]:
    kv_link, dtype, kv_format = request.param
    settings = TransferSettings(kv_link=kv_link, kv_transfer_dtype=dtype)
    ours = small_layout(num_blocks=8, num_window_layers=2, window=9, dtype=KvDtype.FLOAT32, format=kv_format)
    with ExitStack() as stack:
        peer, pool = KvPool(LAYOUT, "aa"), KvPool(ours, "bb")
        stack.callback(peer.close)
        stack.callback(pool.close)
        noise = np.random.default_rng(0).standard_normal(LAYOUT.total_bytes // 4).astype(np.float32)
        np.frombuffer(peer.data, np.float32)[:] = noise
        shared = SharedBlocks(peer, settings, None, MonotonicClock(), stack)
        links = Links(pool, stack.enter_context(ThreadPoolExecutor(1)), MonotonicClock(), settings)
        stack.callback(links.close)
        yield Pair(peer, pool, links, shared)


def test_only_what_is_needed_is_read_and_counted(ends: Pair) -> None:
    ends.shared._has_digests = False  # what follows is read in all layers too, which is not what is offered
    whole = ends.offer()
    assert ends.read(whole, 0).state is TransferState.DONE
    expected = ends.received.copy()
    ends.received[:] = 0xEE
    ends.shared._has_digests = True
    transfer = ends.read(ends.offer(), OUTSIDE)
    assert transfer.state is TransferState.DONE, transfer.failure
    targets = [target for _, target in COPIES]
    assert np.array_equal(ends.received[0, targets], expected[0, targets])
    assert np.array_equal(ends.received[:, targets[OUTSIDE:]], expected[:, targets[OUTSIDE:]])
    assert (ends.received[1:, targets[:OUTSIDE]] == 0xEE).all()
    one_layer = ends.pool.layout.layer_block_bytes
    assert transfer.num_bytes == (OUTSIDE * 1 + 1 * 3) * one_layer


@pytest.mark.parametrize(
    ("layer", "source", "is_found"), [(0, SOURCES[1], True), (2, SOURCES[3], True), (2, SOURCES[1], False)]
)
def test_digests_are_of_what_is_read(ends: Pair, layer: int, source: int, is_found: bool) -> None:
    offer = ends.offer()
    ends.peer.blocks[layer, source, 0] += 1
    transfer = ends.read(offer, OUTSIDE)
    assert transfer.state is (TransferState.FAILED if is_found else TransferState.DONE), transfer.failure
    assert bool(transfer.num_repeated) == is_found


def test_a_model_that_slides_in_all_layers_sends_nothing_from_behind_the_window() -> None:
    layout = small_layout(num_blocks=12, num_window_layers=3, window=9)
    read = KvRead(COPIES, range(3), num_outside_window=OUTSIDE)
    assert [(len(part.blocks), part.layers) for part in read.parts(layout)] == [(1, range(3))]


def test_more_blocks_than_there_are_cannot_be_outside(ends: Pair) -> None:
    with pytest.raises(TransferError, match="5 of 4 blocks cannot be outside"):
        ends.read(ends.offer(), 5)


def test_pools_of_other_windows_are_not_for_each_other() -> None:
    with pytest.raises(TransferError, match="differ in window"):
        check_convertible(small_layout(num_blocks=12, num_window_layers=2, window=8), LAYOUT)


@pytest.mark.parametrize("window", [None, 1, 4, 5, 9])
def test_the_first_seen_block_is_the_first_that_a_later_token_attends_to(window: int | None) -> None:
    block_size = 4
    for num_tokens in range(40):
        seen = [p for p in range(num_tokens + 1) if window is None or p > num_tokens - window]
        assert first_seen_block(num_tokens, window, block_size) == seen[0] // block_size


@pytest.mark.parametrize("fields", [{"num_window_layers": 4, "window": 9}, {"num_window_layers": 1}, {"window": 9}])
def test_layers_and_window_go_together(fields: dict[str, int]) -> None:
    with pytest.raises(Exception, match="cannot have a window"):
        KvLayout(**{name: getattr(LAYOUT, name) for name in LAYOUT.__struct_fields__[:7]}, **fields)
