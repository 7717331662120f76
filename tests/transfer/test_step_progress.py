"""Blocks that are read while a step still writes them: layer by layer behind its progress, over every link."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import numpy as np
import pytest
from link_contract import DEADLINE_S, Ended, Ends, pairs, small_layout
from test_links import shm_in_one_process, tcp_in_one_process

from disagg.base.errors import TransferError
from disagg.transfer.link import KvRead, Transfer, TransferState
from disagg.transfer.pool import KvPool
from disagg.transfer.step_progress import ALL_LAYERS, StepProgress

STEP = 7
BLOCKS = pairs((0, 5), (1, 6), (9, 0))


@pytest.fixture
def progress() -> Iterator[StepProgress]:
    pool = KvPool(small_layout(num_blocks=1), "aa")
    yield pool.progress
    pool.close()


def stop() -> None:
    raise TransferError("it waits")


def write_layers(progress: StepProgress, num_layers: int) -> None:
    """Do what a native kernel does when it has written so many layers."""
    progress._word[0] += num_layers


def test_a_step_that_has_not_begun_has_no_layer_and_one_that_ended_has_all(progress: StepProgress) -> None:
    assert [progress.num_layers(STEP)] == [0]
    progress.begin(STEP)
    assert [progress.num_layers(step) for step in (STEP - 1, STEP, STEP + 1)] == [ALL_LAYERS, 0, 0]
    progress.end()
    assert [progress.num_layers(step) for step in (STEP - 1, STEP, STEP + 1)] == [ALL_LAYERS, ALL_LAYERS, 0]


def test_only_the_first_computation_of_a_step_counts_its_layers(progress: StepProgress) -> None:
    assert not progress.take()
    progress.begin(STEP)
    assert progress.take()
    assert not progress.take()  # the same step again, a sequence at a time
    progress.begin(STEP + 1)
    progress.end()
    assert not progress.take()


def test_layers_are_told_once_and_in_order(progress: StepProgress) -> None:
    progress.begin(STEP)
    followed = progress.follow(STEP, range(1, 6), stop)
    with pytest.raises(TransferError, match="it waits"):
        next(followed)
    write_layers(progress, 3)
    followed = progress.follow(STEP, range(1, 6), stop)
    assert next(followed) == range(1, 3)
    progress.end()
    assert list(followed) == [range(3, 6)]


@pytest.fixture(params=[shm_in_one_process, tcp_in_one_process], ids=lambda make: make.__name__)
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    make: Callable[[ExitStack], Ends] = request.param
    with ExitStack() as stack:
        yield make(stack)


@pytest.fixture
def peer(ends: Ends) -> KvPool:
    """The peer's pool, in which a step has begun."""
    assert ends.peer_pool is not None
    ends.peer_pool.progress.begin(STEP)
    return ends.peer_pool


def follow(ends: Ends, ended: Ended) -> Transfer:
    read = KvRead(BLOCKS, range(3), access=ends.access, timeout_s=DEADLINE_S, behind_step=STEP, wants_digests=True)
    return ends.link.read(read, ended)


def test_a_layer_is_read_when_it_is_written_and_not_before(ends: Ends, peer: KvPool) -> None:
    ended = Ended()
    write_layers(peer.progress, 2)
    follow(ends, ended)
    ends.peer[2] ^= 0xFF
    peer.blocks[2] = ~peer.blocks[2]
    peer.progress.end()
    transfer = ended.wait()
    assert transfer.state is TransferState.DONE, transfer.failure
    assert transfer.digests == ends.digests(*[source for source, _ in BLOCKS])
    for source, target in BLOCKS:
        assert np.array_equal(ends.local[:, target], ends.peer[:, source])


def test_a_read_of_which_nothing_comes_can_be_cancelled(ends: Ends, peer: KvPool) -> None:
    ended = Ended()
    follow(ends, ended).cancel()
    assert ended.wait().state is TransferState.CANCELLED
    assert not peer.progress.num_layers(STEP)


def test_a_read_behind_a_step_ends_with_its_link(ends: Ends, peer: KvPool) -> None:
    ended = Ended()
    follow(ends, ended)
    ends.link.close()
    assert ended.wait().state is TransferState.FAILED
    assert not peer.progress.num_layers(STEP)


def test_digests_of_what_is_not_written_yet_are_refused(ends: Ends, peer: KvPool) -> None:
    read = KvRead(BLOCKS, range(3), digests=ends.digests(0, 1, 9), access=ends.access, behind_step=STEP)
    with pytest.raises(TransferError, match="cannot have digests yet"):
        ends.link.read(read, Ended())
    peer.progress.end()
