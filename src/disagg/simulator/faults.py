"""What goes wrong in a simulation, and when: the same cores decide what becomes of it as in a live deployment."""

from dataclasses import dataclass

from disagg.base.ids import InstanceId, RequestId
from disagg.scheduling.router.inputs import AnyCommand


@dataclass(frozen=True)
class InstanceDeath:
    """An instance's process ends at ``time_s``. A new one takes requests ``start_s`` after its start."""

    time_s: float
    instance: InstanceId
    start_s: float = 1.0


@dataclass(frozen=True)
class TimedCommand:
    """What an operator wants at ``time_s``; nothing happens where it cannot be done then.

    An instance that joins is one of the cluster's spares, and takes requests ``start_s`` later.
    """

    time_s: float
    command: AnyCommand
    start_s: float = 1.0


@dataclass(frozen=True)
class Faults:
    """Deaths, commands, and requests whose first pull fails when all its bytes have travelled."""

    deaths: tuple[InstanceDeath, ...] = ()
    commands: tuple[TimedCommand, ...] = ()
    failing_pulls: frozenset[RequestId] = frozenset()
