"""Threads on lent cores: what they help with is the same to the last bit, and they go when a core is wanted back."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import pytest
import torch
from kernel_cases import make_batch, num_threads
from native_kernels import FASTEST, native
from test_native_decoder import BLOCK_SIZE, make_pool, make_settings, make_weights

from disagg.engine.kernels import _native
from disagg.engine.kernels.composed_decoder import decoder_stack

OWN, OTHER = sorted(os.sched_getaffinity(0))[0], sorted(os.sched_getaffinity(0))[-1]
MANY = 40


class Host:
    """A board, the neighbour that owns core ``OTHER``, and a decoder that may borrow it."""

    def __init__(self) -> None:
        self.cells: npt.NDArray[np.uint32] = np.zeros((OTHER + 1, _native.CORE_CELL_BYTES // 4), dtype=np.uint32)
        address = self.cells.ctypes.data
        self.neighbour = _native.CoreBoard(address, [OTHER])
        self.helpers = _native.Helpers(_native.CoreBoard(address, [OWN]), [OTHER])
        self.helpers.allow(1)
        self.batch, num_blocks = make_batch([(300, 290), (90, 60), (20, 1)], BLOCK_SIZE)
        self.pools = [make_pool(2, num_blocks, torch.bfloat16) for _ in range(2)]
        backend = native.NativeBackend(helpers=self.helpers)
        settings = make_settings(None, None)
        self.decoder = decoder_stack(backend, make_weights(backend, torch.bfloat16, 2), settings)
        alone = decoder_stack(FASTEST, make_weights(FASTEST, torch.bfloat16, 2), settings)
        self.expected = alone(self.pools[1], self.batch)

    def compute(self) -> None:
        """Compute a step, which must be what one thread computes."""
        torch.testing.assert_close(self.decoder(self.pools[0], self.batch), self.expected, rtol=0, atol=0)
        torch.testing.assert_close(*self.pools, rtol=0, atol=0)

    def is_helped(self) -> bool:
        """Return whether a helper comes in one of the next steps."""
        for _ in range(MANY):
            self.compute()
            if self.helpers.take_seconds() > 0:
                return True
        return False


@pytest.fixture
def host() -> Iterator[Host]:
    with num_threads(1):
        yield Host()


def test_a_helper_computes_on_a_core_that_is_lent(host: Host) -> None:
    host.neighbour.lend()
    assert host.is_helped()


def test_nobody_helps_on_a_core_that_is_needed_or_that_nobody_lends(host: Host) -> None:
    assert not host.is_helped()
    host.neighbour.lend()
    host.neighbour.take_back()
    host.helpers.take_seconds()
    assert not host.is_helped()


def test_a_step_that_may_not_borrow_is_computed_alone(host: Host) -> None:
    host.neighbour.lend()
    host.helpers.allow(0)
    assert not host.is_helped()
    host.helpers.allow(1)
    assert host.is_helped()


def test_a_core_is_lent_to_one_at_a_time(host: Host) -> None:
    host.neighbour.lend()
    another = _native.Helpers(_native.CoreBoard(host.cells.ctypes.data, [OWN]), [OTHER])
    assert host.is_helped()
    assert another.take_seconds() == 0


@contextmanager
def restless(neighbour: _native.CoreBoard) -> Iterator[None]:
    """A neighbour that lends its core and takes it back all the time."""
    is_over = threading.Event()

    def trouble() -> None:
        while not is_over.is_set():
            neighbour.lend()
            neighbour.take_back()

    thread = threading.Thread(target=trouble)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


@pytest.mark.parametrize("own", [1, 2])
def test_steps_are_the_same_however_often_a_core_changes_hands(host: Host, own: int) -> None:
    with num_threads(own), restless(host.neighbour):
        for _ in range(MANY):
            host.compute()


def test_the_word_of_a_dead_process_does_not_count(host: Host) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    host.neighbour.lend()
    host.neighbour.take_back()
    host.cells[OTHER, 1] = process.pid  # the owner died in a step
    assert host.is_helped()
