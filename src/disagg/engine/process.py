"""What an engine process asks of the operating system: its cores, and to end when its parent does."""

import ctypes
import os
import signal
from collections.abc import Sequence
from typing import Final

from disagg.base.errors import ConfigurationError
from disagg.base.units import format_ranges

_PR_SET_PDEATHSIG: Final = 1


def pin_to_cores(cores: Sequence[int]) -> None:
    """Run on these cores only, all later threads included; raise ConfigurationError when one is not to be had."""
    if not cores:
        return
    try:
        os.sched_setaffinity(0, cores)
    except (OSError, ValueError, OverflowError) as error:
        usable = format_ranges(sorted(os.sched_getaffinity(0)))
        raise ConfigurationError(
            f"cannot run on cores {format_ranges(cores)} ({error}); usable are {usable}"
        ) from error


def end_with_parent(parent_pid: int) -> bool:
    """Have the kernel kill this process when its parent ends, however that happens.

    Returns False when the parent has gone already (or is another process), and this one should not go on.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    return os.getppid() == parent_pid
