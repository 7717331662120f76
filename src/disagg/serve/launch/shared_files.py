"""Memory that a server's instances share: anonymous files, of which each instance is told the path.

They have no name in any directory: they are gone when this process and all instances are, however they end.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_BOARD_BYTES: Final = 1 << 22
"""Room for 65,536 cores; what nobody touches takes no memory."""


@contextmanager
def shared_weights() -> Iterator[str]:
    """Give the path of an empty file for the packed weights, which the first instance fills."""
    with _anonymous_file("disagg-weights", os.MFD_ALLOW_SEALING) as descriptor:
        yield _path_of(descriptor)


@contextmanager
def core_board() -> Iterator[str]:
    """Give the path of a file of zeros, in which instances say which of their cores have a step to compute."""
    with _anonymous_file("disagg-cores") as descriptor:
        os.ftruncate(descriptor, _BOARD_BYTES)
        yield _path_of(descriptor)


@contextmanager
def _anonymous_file(name: str, flags: int = 0) -> Iterator[int]:
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _path_of(descriptor: int) -> str:
    return f"/proc/{os.getpid()}/fd/{descriptor}"
