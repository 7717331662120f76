"""A child process that ends with the one that started it."""

import ctypes
import os
import signal
from typing import Final

_PR_SET_PDEATHSIG: Final = 1


def end_with_parent(parent_pid: int) -> bool:
    """Have the kernel kill this process when its parent ends, however that happens.

    Returns False when the parent has gone already (or is another process), and this one should not go on.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    return os.getppid() == parent_pid
