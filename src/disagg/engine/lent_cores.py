"""The cores of an instance, which it lends while it has no step, and those that others lend to it."""

import mmap
import os
from typing import Final, Protocol

import numpy as np

from disagg.base.core_settings import LentCores
from disagg.base.errors import ConfigurationError
from disagg.engine.kernels.native_backend import are_built


class Cores(Protocol):
    """What an instance's steps say of its cores. Its methods belong to one thread."""

    def need(self) -> None:
        """There is a step: the own cores are not to be had."""

    def lend(self) -> None:
        """There is none."""

    def borrow(self, number: int) -> None:
        """Let the next step use so many cores of others, while they can be had."""

    def take_borrowed_s(self) -> float:
        """Return how long others' cores computed since this was asked last, in seconds of one core."""


class OwnCores:
    """Those of an instance that lends and borrows none. See ``Cores``."""

    def need(self) -> None:
        """See ``Cores``."""

    def lend(self) -> None:
        """See ``Cores``."""

    def borrow(self, number: int) -> None:
        """See ``Cores``."""

    def take_borrowed_s(self) -> float:
        """See ``Cores``."""
        return 0.0


OWN_CORES: Final = OwnCores()


class SharedCores:
    """Those of an instance whose host has a board, see native/core_board.h. See ``Cores``."""

    def __init__(self, own: tuple[int, ...], lent: LentCores) -> None:
        """Map the board, and start a thread for each core to borrow. Raises ConfigurationError where that fails."""
        from disagg.engine.kernels import _native  # it is not built everywhere

        try:
            descriptor = os.open(lent.board, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigurationError(f"the cores of this host cannot be lent: {error}") from error
        try:
            self._board_memory = mmap.mmap(descriptor, 0, mmap.MAP_SHARED)
        finally:
            os.close(descriptor)
        num_cells = len(self._board_memory) // _native.CORE_CELL_BYTES
        if absent := [core for core in (*own, *lent.cores) if core >= num_cells]:
            raise ConfigurationError(f"core {absent[0]} is not on the board of {num_cells} cores at {lent.board}")
        address = np.frombuffer(self._board_memory, dtype=np.uint8).ctypes.data
        self._board = _native.CoreBoard(address, list(own))
        self.helpers = _native.Helpers(self._board, list(lent.cores))
        """For steps of the native kernels."""
        self._is_needed = True

    def need(self) -> None:
        """See ``Cores``."""
        if not self._is_needed:
            self._is_needed = True
            self._board.take_back()

    def lend(self) -> None:
        """See ``Cores``."""
        if self._is_needed:
            self._is_needed = False
            self._board.lend()

    def borrow(self, number: int) -> None:
        """See ``Cores``."""
        self.helpers.allow(number)

    def take_borrowed_s(self) -> float:
        """See ``Cores``."""
        return self.helpers.take_seconds()

    def close(self) -> None:
        """End the threads; no step may follow."""
        self._board.lend()
        del self.helpers, self._board  # before the memory that they look at


def open_cores(own: tuple[int, ...], lent: LentCores | None) -> SharedCores | None:
    """Return the cores of an instance that lends them; None where it does not, or has no native kernels."""
    if lent is None or not are_built():
        return None
    return SharedCores(own, lent)
