"""What an engine process asks of the operating system: its cores."""

import os
from collections.abc import Sequence

from disagg.base.errors import ConfigurationError
from disagg.base.units import format_ranges


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
