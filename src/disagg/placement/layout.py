"""Which devices each instance of a composition gets, and the placement file that says so."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from disagg.base.config import InstanceGroup, Placement
from disagg.base.errors import ConfigurationError
from disagg.base.transfer_settings import KvTransferDtype
from disagg.costs.links import KvCodec
from disagg.costs.topology import DeviceRef, NodeName, Place, write_devices
from disagg.placement.composition import Composition
from disagg.placement.instance_choice import InstanceChoice
from disagg.placement.problem import PlanProblem
from disagg.simulator.cluster import ClusterSpec
from disagg.simulator.engines import build_cluster


@dataclass(frozen=True)
class PlacedInstance:
    """An instance on its devices. ``unit`` numbers the unit that it hands over within; -1 for what is outside."""

    choice: InstanceChoice
    place: Place
    unit: int


class _Devices:
    """What is free, node by node."""

    def __init__(self, problem: PlanProblem) -> None:
        self._kinds = {node.name: node.device for node in problem.topology.nodes}
        self._free = {node.name: list(range(node.num_devices)) for node in problem.topology.nodes}

    def take(self, choice: InstanceChoice, nodes: Sequence[NodeName] | None = None) -> Place:
        """Return devices for an instance: on one node, the fullest that has room, or else stage by stage."""
        whole = self._take(choice.kind, choice.num_devices, nodes)
        if whole is not None:
            return whole
        place: Place = ()
        for _ in range(choice.pipeline_parallel):
            stage = self._take(choice.kind, choice.tensor_parallel, nodes)
            if stage is None:
                raise ConfigurationError(f"no node has {choice.tensor_parallel} free devices left for {choice}")
            place += stage
        return place

    def room_for(self, unit: Sequence[tuple[InstanceChoice, int]]) -> list[NodeName] | None:
        """Return the fullest node with room for a whole unit, whose KV then never leaves it; None where none has."""
        kinds = {choice.kind for choice, _ in unit}
        wanted = sum(choice.num_devices * count for choice, count in unit)
        candidates = [
            (len(free), name)
            for name, free in self._free.items()
            if {self._kinds[name]} == kinds and len(free) >= wanted
        ]
        return [min(candidates, key=lambda one: one[0])[1]] if candidates else None

    def _take(self, kind: str, count: int, nodes: Sequence[NodeName] | None) -> Place | None:
        candidates = [
            (len(free), name)
            for name, free in self._free.items()
            if self._kinds[name] == kind and len(free) >= count and (nodes is None or name in nodes)
        ]
        if not candidates:
            return None
        name = min(candidates, key=lambda one: one[0])[1]
        taken, self._free[name] = self._free[name][:count], self._free[name][count:]
        return tuple(DeviceRef(name, index) for index in taken)


def lay_out(problem: PlanProblem, composition: Composition) -> list[PlacedInstance]:
    """Return all instances on their devices, unit after unit. Raises ConfigurationError when they do not fit so."""
    devices = _Devices(problem)
    placed: list[PlacedInstance] = []
    for unit in range(composition.num_units):
        if composition.nodes_per_unit:
            placed += _segments(problem, composition, devices, unit)
            continue
        together = devices.room_for(composition.unit)
        for choice in _largest_first(composition.unit):
            placed.append(PlacedInstance(choice, devices.take(choice, together), unit))
    placed += [PlacedInstance(choice, devices.take(choice), -1) for choice in _largest_first(composition.extra)]
    return placed


def _segments(problem: PlanProblem, composition: Composition, devices: _Devices, unit: int) -> Iterator[PlacedInstance]:
    """Yield a unit's instances with an equal part of each pipeline on every node of the unit."""
    width = composition.nodes_per_unit
    kind = composition.unit[0][0].kind
    nodes = [node.name for node in problem.nodes(kind)][unit * width : (unit + 1) * width]
    for choice in _largest_first(composition.unit):
        stages = choice.pipeline_parallel // width
        place: Place = ()
        for node in nodes:
            for _ in range(stages):
                place += devices.take(_stage(choice), [node])
        yield PlacedInstance(choice, place, unit)


def _stage(choice: InstanceChoice) -> InstanceChoice:
    return InstanceChoice(choice.role, choice.kind, choice.tensor_parallel)


def _largest_first(parts: Sequence[tuple[InstanceChoice, int]]) -> list[InstanceChoice]:
    """Return the choices, each as often as it occurs: wide ones find room only while there is much."""
    every = [choice for choice, count in parts for _ in range(count)]
    return sorted(every, key=lambda choice: -choice.tensor_parallel)


def placement_of(placed: Sequence[PlacedInstance], codec: KvCodec = KvCodec.RAW) -> Placement:
    """Return the placement file of these instances, with their devices, and the form in which KV travels."""
    groups: list[InstanceGroup] = []
    order = {(one.unit, one.choice): None for one in placed}
    for unit, choice in order:
        places = [one.place for one in placed if (one.unit, one.choice) == (unit, choice)]
        devices = write_devices(tuple(device for place in places for device in place))
        groups.append(choice.group(len(places), devices))
    coded = None if codec is KvCodec.RAW else KvTransferDtype(codec.value)
    return Placement(groups=tuple(groups), kv_transfer_dtype=coded)


def cluster_of(problem: PlanProblem, placed: Sequence[PlacedInstance], codec: KvCodec = KvCodec.RAW) -> ClusterSpec:
    """Return the simulated deployment of these instances."""
    any_platform = next(iter(problem.platforms.values()))
    placement = placement_of(placed, codec)
    return build_cluster(placement, any_platform, problem.rules, problem.topology, problem.platforms)
