"""Which instances of a placement a cluster is to keep on one node, and what each asks of its node. Pure."""

import enum
from collections.abc import Iterator
from dataclasses import dataclass

from msgspec import structs

from disagg.base.config import Device, InstanceGroup, Placement
from disagg.base.request import Role
from disagg.costs.topology import read_devices
from disagg.serve.launch.deployment import HostSettings, check_parallelism


class Spread(enum.Enum):
    """How the instances of a bench sit; the values are Ray's words."""

    ONE_NODE = "STRICT_PACK"
    """KV blocks between them stay inside the node."""
    APART = "SPREAD"
    """On as many nodes as there are, so that one of them takes few along."""


@dataclass(frozen=True)
class Seat:
    """One instance, which asks for so many CPUs and GPUs of one node."""

    group: InstanceGroup
    num_gpus: int = 0

    @property
    def num_cpus(self) -> int:
        """A core for each of its threads."""
        assert self.group.num_threads is not None, "seats know their threads"
        return self.group.num_threads

    def bundle(self) -> dict[str, float]:
        """Return what it asks for, in Ray's words."""
        gpus = {"GPU": float(self.num_gpus)} if self.num_gpus else {}
        return {"CPU": float(self.num_cpus)} | gpus


@dataclass(frozen=True)
class Bench:
    """Seats that are placed together."""

    seats: tuple[Seat, ...]
    spread: Spread


def seat(group: InstanceGroup, host: HostSettings) -> Seat:
    """Return the seat of one more instance of a group."""
    check_parallelism(group)
    num_threads = host.threads or group.num_threads or 1
    return Seat(structs.replace(group, count=1, num_threads=num_threads, devices=()), _gpus(host))


def benches(placement: Placement, host: HostSettings) -> tuple[Bench, ...]:
    """Return the seats of a placement, those of a segment on a bench of their own.

    A segment is what the placement puts on the devices of one node: prefill and decode instances that hand over there
    (DistServe's Algorithm 2). The others, and all of a placement without devices, sit apart. Raises
    ConfigurationError for instances that this version cannot run.
    """
    segments: dict[str, list[Seat]] = {}
    apart: list[Seat] = []
    for one, node in _seats(placement, host):
        (apart if node is None else segments.setdefault(node, [])).append(one)
    together = []
    for members in segments.values():
        if {Role.PREFILL, Role.DECODE} <= {one.group.role for one in members}:
            together.append(Bench(tuple(members), Spread.ONE_NODE))
        else:
            apart += members
    return (*together, *([Bench(tuple(apart), Spread.APART)] if apart else []))


def _seats(placement: Placement, host: HostSettings) -> Iterator[tuple[Seat, str | None]]:
    """Yield each instance with the node that the placement names."""
    for group in placement.groups:
        nodes = [device.node for device in read_devices(group.devices)]
        for index in range(group.count):
            yield seat(group, host), nodes[index] if nodes else None


def _gpus(host: HostSettings) -> int:
    return 1 if host.device is Device.CUDA else 0
