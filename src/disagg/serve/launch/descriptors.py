"""File descriptors: as many as the system allows, and how they are shared out."""

import logging
import os
import resource
from dataclasses import dataclass
from typing import Final

from disagg.base.errors import ConfigurationError

logger = logging.getLogger(__name__)

_MAX_BACKLOG: Final = 2048
_OWN: Final = 64
"""For logs, sockets to instances, and what libraries open for a moment."""
_PER_INSTANCE: Final = 16
"""For the pipes of starting it (again), and its control connection."""
_FEWEST_CONNECTIONS: Final = 16


@dataclass(frozen=True, slots=True)
class DescriptorBudget:
    """``backlog`` connections may wait to be accepted; all may be accepted at once, on top of ``max_connections``."""

    max_connections: int
    backlog: int


def raise_descriptor_limit() -> None:
    """Raise the soft limit of open files to the hard one; instances inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:
        logger.warning("at most %d files can be open: the limit could not be raised to %d (%s)", soft, hard, error)


def accept_backlog() -> int:
    """Return how many connections may wait to be accepted: few enough for all of them to be accepted at once."""
    return max(1, min(_MAX_BACKLOG, _limit() // 8))


def share_descriptors(num_instances: int) -> DescriptorBudget:
    """Return what connections may have of the present limit, with enough left to start every instance again.

    Raises ConfigurationError where hardly anything is left.
    """
    soft = _limit()
    backlog = accept_backlog()
    reserve = _num_open() + _OWN + _PER_INSTANCE * num_instances + backlog
    if soft - reserve < _FEWEST_CONNECTIONS:
        raise ConfigurationError(
            f"at most {soft} files can be open, too few for {num_instances} instances and their clients: "
            f"raise the limit to {2 * (reserve + _FEWEST_CONNECTIONS)} or more (ulimit -n)"
        )
    return DescriptorBudget(max_connections=soft - reserve, backlog=backlog)


def _limit() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 20 if soft == resource.RLIM_INFINITY else soft


def _num_open() -> int:
    return len(os.listdir("/proc/self/fd"))
