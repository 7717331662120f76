"""The memory in which a server's instances share their packed weights."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_NAME: Final = "disagg-weights"


@contextmanager
def shared_weights() -> Iterator[str]:
    """Give the path of an empty anonymous file, which the first instance fills.

    It has no name in any directory: it is gone when this process and all instances are, however they end.
    """
    descriptor = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        yield f"/proc/{os.getpid()}/fd/{descriptor}"
    finally:
        os.close(descriptor)
