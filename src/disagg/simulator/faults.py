"""What goes wrong in a simulation, and when: the same cores decide what becomes of it as in a live deployment."""

from dataclasses import dataclass

from disagg.base.ids import InstanceId, RequestId


@dataclass(frozen=True)
class InstanceDeath:
    """An instance's process ends at ``time_s``. A new one takes requests ``start_s`` after its start."""

    time_s: float
    instance: InstanceId
    start_s: float = 1.0


@dataclass(frozen=True)
class Faults:
    """Deaths, and requests whose first pull fails when all its bytes have travelled."""

    deaths: tuple[InstanceDeath, ...] = ()
    failing_pulls: frozenset[RequestId] = frozenset()
