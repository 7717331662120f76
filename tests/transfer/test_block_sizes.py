"""Blocks of one size made into blocks of another, in every form: compiled code and NumPy, over each link, all at once
or behind a step. A sequence's tokens come to their places, and nothing else of the pool is written.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest
from link_contract import DEADLINE_S, Ended, grant_all

from disagg.base.clock import MonotonicClock
from disagg.base.errors import TransferError
from disagg.base.ids import BlockId
from disagg.base.transfer_settings import KvLinkChoice, KvTransferDtype, TransferSettings
from disagg.cache.layout import KvDtype, KvFormat, KvLayout
from disagg.costs.links import KvCodec
from disagg.transfer.block_forms import BlockForms
from disagg.transfer.digests import join_digests
from disagg.transfer.element_types import from_float, to_float
from disagg.transfer.link import KvRead, Transfer, TransferState
from disagg.transfer.links import Links, SharedBlocks
from disagg.transfer.pool import KvPool

FORMS = list(product((KvDtype.FLOAT32, KvDtype.BFLOAT16, KvDtype.FLOAT16), KvFormat))
SIZES = [(4, 8), (8, 4), (2, 6), (6, 2)]
LAYERS, HEADS, DIM, NUM_TOKENS = 2, 3, 6, 24


def layout(form: tuple[KvDtype, KvFormat], size: int) -> KvLayout:
    """A pool with room for two sequences of ``NUM_TOKENS``."""
    return KvLayout(
        num_layers=LAYERS,
        num_blocks=2 * NUM_TOKENS // size,
        num_kv_heads=HEADS,
        block_size=size,
        head_dim=DIM,
        dtype=form[0],
        format=form[1],
    )


def meant() -> np.ndarray:
    """A sequence: [layer, K or V, head, token, channel], numbers that every type holds exactly."""
    shape = (LAYERS, 2, HEADS, NUM_TOKENS, DIM)
    return (np.arange(np.prod(shape)) * 7 % 128).astype(np.float32).reshape(shape)


def places(one: KvLayout, token: int, blocks: list[int]) -> Iterator[tuple[tuple[int, int, int, int], int]]:
    """Where a token's elements are in a pool, by the words of ``KvFormat``: (layer, kind, head, channel), index."""
    size, w = one.block_size, 4 // one.dtype.itemsize
    block, inside = blocks[token // size], token % size
    for layer, kind, head, channel in product(range(LAYERS), range(2), range(HEADS), range(DIM)):
        start = ((layer * one.num_blocks + block) * 2 + kind) * HEADS * size * DIM + head * size * DIM
        if one.format is KvFormat.TOKEN_MAJOR:
            index = inside * DIM + channel
        elif kind == 0:
            index = (channel // w * size + inside) * w + channel % w
        else:
            index = (inside // w * DIM + channel) * w + inside % w
        yield (layer, kind, head, channel), start + index


def write(one: KvLayout, pool: memoryview, blocks: list[int]) -> None:
    """Put the sequence into these blocks of a pool."""
    values = to_float(np.frombuffer(pool, np.uint8), one.dtype).copy()
    for token in range(NUM_TOKENS):
        for (layer, kind, head, channel), index in places(one, token, blocks):
            values[index] = meant()[layer, kind, head, token, channel]
    pool[:] = from_float(values, one.dtype).tobytes()


def read_back(one: KvLayout, pool: memoryview, blocks: list[int]) -> np.ndarray:
    values, found = to_float(np.frombuffer(pool, np.uint8), one.dtype), np.zeros_like(meant())
    for token in range(NUM_TOKENS):
        for (layer, kind, head, channel), index in places(one, token, blocks):
            found[layer, kind, head, token, channel] = values[index]
    return found


@dataclass
class Pieces:
    """Which parts of which blocks make up the sequence."""

    pairs: list[tuple[BlockId, BlockId]]
    parts: list[int]


def scattered(one: KvLayout) -> list[int]:
    """Blocks for the sequence, from the last of a pool to the first."""
    return list(range(one.num_blocks))[::-1][: NUM_TOKENS // one.block_size]


def cut(theirs: KvLayout, ours: KvLayout, tokens: range) -> Pieces:
    """The pieces that hold these tokens, of a sequence in ``scattered`` blocks on either side."""
    count, most = sorted((theirs.block_size, ours.block_size))
    starts = tokens[::count]
    return Pieces(
        [
            (BlockId(scattered(theirs)[start // theirs.block_size]), BlockId(scattered(ours)[start // ours.block_size]))
            for start in starts
        ],
        [start % most // count for start in starts],
    )


@pytest.mark.parametrize("native", [True, False], ids=["native", "numpy"])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: f"{sizes[0]}-to-{sizes[1]}")
@pytest.mark.parametrize("source", FORMS, ids=lambda form: f"{form[0].value}-{form[1].value}")
def test_every_token_comes_to_its_place(source: tuple[KvDtype, KvFormat], sizes: tuple[int, int], native: bool) -> None:
    theirs = layout(source, sizes[0])
    came = memoryview(bytearray(theirs.total_bytes))
    write(theirs, came, scattered(theirs))
    for form in FORMS:
        ours = layout(form, sizes[1])
        forms = BlockForms(theirs, ours, native=native)
        if native and not forms.is_native:
            pytest.skip("there is no compiled code")
        pool = memoryview(bytearray(ours.total_bytes))
        pieces = cut(theirs, ours, range(NUM_TOKENS))
        starts = [theirs.offset(layer, block) for layer in range(LAYERS) for block, _ in pieces.pairs]
        targets = [block for _, block in pieces.pairs]
        forms.convert(came, starts, pool, range(LAYERS), targets, pieces.parts)
        assert np.array_equal(read_back(ours, pool, scattered(ours)), meant())
        expected = memoryview(bytearray(ours.total_bytes))
        write(ours, expected, scattered(ours))
        assert pool == expected, "something else was written"


LINKS = [
    (KvLinkChoice.SHM, KvTransferDtype.RAW),
    (KvLinkChoice.TCP, KvTransferDtype.RAW),
    (KvLinkChoice.TCP, KvTransferDtype.INT8),
]


@dataclass
class Ends:
    peer: KvPool
    pool: KvPool
    links: Links
    shared: SharedBlocks

    def read(self, pieces: Pieces, digests: bytes = b"", **changes: object) -> Transfer:
        ended = Ended()
        access = grant_all(self.shared, self.peer.layout, DEADLINE_S)
        read = KvRead(pieces.pairs, range(LAYERS), digests, access, parts=pieces.parts)
        self.links.open(self.shared.address).read(changed(read, changes), ended)
        return ended.wait()

    def digests(self, pieces: Pieces) -> bytes:
        """Those of the peer's blocks, each once."""
        return join_digests(self.peer.blocks, dict.fromkeys(block for block, _ in pieces.pairs))


def changed(read: KvRead, changes: dict[str, object]) -> KvRead:
    fields = {name: getattr(read, name) for name in KvRead.__slots__}
    return KvRead(**{**fields, **changes})


@pytest.fixture(params=product(LINKS, SIZES), ids=lambda one: f"{one[0][0].value}-{one[0][1].value}-{one[1]}")
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    """A pool in bfloat16, interleaved, and a reader's in the same order, with blocks of another size."""
    (kv_link, form), (theirs, ours) = request.param
    kind = (KvDtype.BFLOAT16, KvFormat.INTERLEAVED)
    with ExitStack() as stack:
        peer, pool = (KvPool(layout(kind, size), name) for size, name in ((theirs, "aa"), (ours, "bb")))
        stack.callback(peer.close)
        stack.callback(pool.close)
        settings = TransferSettings(kv_link=kv_link, kv_transfer_dtype=form)
        shared = SharedBlocks(peer, settings, None, MonotonicClock(), stack)
        links = Links(pool, stack.enter_context(ThreadPoolExecutor(1)), MonotonicClock(), settings)
        stack.callback(links.close)
        write(peer.layout, peer.data, scattered(peer.layout))
        yield Ends(peer, pool, links, shared)


def test_a_read_brings_every_token_and_checks_each_block_of_the_peer_once(ends: Ends) -> None:
    theirs, ours = ends.peer.layout, ends.pool.layout
    pieces = cut(theirs, ours, range(NUM_TOKENS))
    transfer = ends.read(pieces, ends.digests(pieces))
    assert (transfer.state, transfer.num_repeated) == (TransferState.DONE, 0), transfer.failure
    assert transfer.num_bytes == NUM_TOKENS // ours.block_size * ours.block_bytes
    found = read_back(ours, ends.pool.data, scattered(ours))
    most = 0.5 if transfer.codec is KvCodec.INT8 else 0.0
    assert np.abs(found - meant()).max() <= most
    words = f"blocks of {theirs.block_size} tokens to blocks of {ours.block_size}"
    assert words in ends.links.why(ends.shared.address)


def test_a_block_that_is_not_what_was_offered_fails_the_read(ends: Ends) -> None:
    pieces = cut(ends.peer.layout, ends.pool.layout, range(NUM_TOKENS))
    offered = ends.digests(pieces)
    ends.peer.data[ends.peer.layout.offset(1, pieces.pairs[-1][0]) + 5] ^= 1
    transfer = ends.read(pieces, offered)
    assert transfer.state is TransferState.FAILED
    assert f"KV block {pieces.pairs[-1][0]} of the peer came twice with another digest" in transfer.failure


def test_the_rest_of_a_sequence_leaves_what_is_there(ends: Ends) -> None:
    """The first tokens are in the own pool already: the larger of the two blocks is begun in its middle, or is not."""
    theirs, ours = ends.peer.layout, ends.pool.layout
    first = ours.block_size
    pieces = cut(theirs, ours, range(first, NUM_TOKENS))
    before = bytes(ends.pool.data)
    assert ends.read(pieces, ends.digests(pieces)).state is TransferState.DONE
    size = ours.layer_block_bytes
    for layer in range(LAYERS):
        start = ours.offset(layer, scattered(ours)[0])
        assert ends.pool.data[start : start + size] == before[start : start + size]
    found = read_back(ours, ends.pool.data, scattered(ours))[:, :, :, first:]
    assert np.abs(found - meant()[:, :, :, first:]).max() <= 0.5


def test_what_is_read_behind_a_step_has_the_digests_of_the_peers_blocks(ends: Ends) -> None:
    pieces = cut(ends.peer.layout, ends.pool.layout, range(NUM_TOKENS))
    ends.peer.progress.begin(3)
    ends.peer.progress.end()
    transfer = ends.read(pieces, behind_step=3, wants_digests=True)
    assert transfer.state is TransferState.DONE, transfer.failure
    assert transfer.digests == ends.digests(pieces)
    assert np.array_equal(read_back(ends.pool.layout, ends.pool.data, scattered(ends.pool.layout)), meant())


@pytest.mark.parametrize("parts", [[], [0], [0, 9]], ids=str)
def test_parts_that_cannot_be_are_refused_at_once(ends: Ends, parts: list[int]) -> None:
    pieces = cut(ends.peer.layout, ends.pool.layout, range(2 * min(ends.peer.layout.block_size, 4)))
    with pytest.raises(TransferError, match="cannot be the parts"):
        ends.read(Pieces(pieces.pairs[:2], parts))
