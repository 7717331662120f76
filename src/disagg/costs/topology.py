"""Topology: the nodes of a cluster, the devices of each, and the link between any two of them. Pure."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Final, NamedTuple, NewType

from disagg.base.errors import ConfigurationError
from disagg.base.ids import InstanceId
from disagg.costs.links import Direction, InstanceLinks, LinkKind, LinkModel, Passage, Ports, Route

NodeName = NewType("NodeName", str)

SHARED_MEMORY: Final = LinkModel(20e9, kind=LinkKind.SHM)
"""Between processes of one host: measured on a Zen 5 server, one core that copies."""


@dataclass(frozen=True)
class DeviceRef:
    """One device of one node."""

    node: NodeName
    index: int

    def __str__(self) -> str:
        return f"{self.node}:{self.index}"


Place = tuple[DeviceRef, ...]
"""Where an instance is: its devices, stage after stage, those of one stage in the order of their ranks."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """A host and its equal devices. ``price_per_hour`` and ``watts`` are those of one device; None: not stated."""

    name: NodeName
    device: str
    """Kind: the name of a data sheet, or of what a profile was made on."""
    num_devices: int
    link: LinkModel
    """Between any two of the devices, each pair for itself."""
    host_link: LinkModel = SHARED_MEMORY
    """Between processes of the host."""
    price_per_hour: float | None = None
    watts: float | None = None

    def __post_init__(self) -> None:
        if self.num_devices < 1:
            raise ConfigurationError(f"node {self.name} has {self.num_devices} devices: give it at least one")


@dataclass(frozen=True)
class Network:
    """What joins nodes: each has ``num_ports`` ports of ``link``, which all its transfers share, in each direction."""

    link: LinkModel
    num_ports: int = 1

    def __post_init__(self) -> None:
        if self.num_ports < 1:
            raise ConfigurationError(f"a network of {self.num_ports} ports joins nothing: give at least one")


@dataclass(frozen=True)
class NodeLink:
    """Two nodes that something else than the common network joins."""

    between: tuple[NodeName, NodeName]
    network: Network


class Topology:
    """A cluster: ``network`` joins any two nodes for which ``links`` name nothing else.

    Raises ConfigurationError when there is no node, one twice, a link of an unknown one, or two that nothing joins.
    """

    def __init__(self, nodes: Sequence[Node], network: Network | None = None, links: Sequence[NodeLink] = ()) -> None:
        self.nodes = tuple(nodes)
        self._by_name = {node.name: node for node in nodes}
        self._network = network
        self._links: dict[frozenset[NodeName], Network] = {}
        for link in links:
            self._add_link(link)
        self._check()

    @classmethod
    def one_node(cls, link: LinkModel | None = None, num_devices: int = 1) -> "Topology":
        """Return a single node of devices of no particular kind; None joins them by a link that takes no time."""
        return cls([Node(name=NodeName("node-0"), device="any", num_devices=num_devices, link=link or LinkModel())])

    def node(self, name: NodeName) -> Node:
        """Return a node by name; raise ConfigurationError, naming those there are."""
        if name not in self._by_name:
            raise ConfigurationError(f"the cluster has no node {name!r}, only {', '.join(self._by_name)}")
        return self._by_name[name]

    def link_between(self, a: DeviceRef | NodeName, b: DeviceRef | NodeName) -> LinkModel:
        """Return the link between two devices, or between hosts, as one transfer at a time sees it."""
        node_a, node_b = _node_of(a), _node_of(b)
        if node_a != node_b:
            return self._between_nodes(node_a, node_b).link
        node = self.node(node_a)
        if isinstance(a, DeviceRef) and isinstance(b, DeviceRef):
            return LinkModel() if a == b else node.link
        return node.host_link

    def route(self, source: Place, target: Place) -> Route:
        """Return how the KV of an instance gets to another.

        It travels in as many parts as the smaller one has devices, side by side. Both sides hold the layers in order,
        so the parts go from the first devices to the first, and so on: equal pipelines of which each stage shares a
        node send nothing over the network.
        """
        num_parts = min(len(source), len(target))
        inside: Counter[LinkModel] = Counter()
        through: Counter[Ports] = Counter()
        for part in range(num_parts):
            a, b = (place[part * len(place) // num_parts] for place in (source, target))
            if a.node == b.node:
                inside[self.link_between(a, b)] += 1
                continue
            network = self._between_nodes(a.node, b.node)
            through[Ports(a.node, Direction.OUT, network.link, network.num_ports)] += 1
            through[Ports(b.node, Direction.IN, network.link, network.num_ports)] += 1
        passages = [Passage(link, count, count) for link, count in inside.items()]
        passages += [Passage(ports.link, count, min(count, ports.count), ports) for ports, count in through.items()]
        return Route(tuple(passages), num_parts)

    def instance_links(self, place: Place, tensor_parallel: int) -> InstanceLinks:
        """Return the links inside an instance: the slowest between devices of a stage, and those to the next stages."""
        stages = [place[start : start + tensor_parallel] for start in range(0, len(place), tensor_parallel)]
        pairs = [self.link_between(a, b) for stage in stages for a, b in combinations(stage, 2)]
        tensor = min(pairs, key=lambda link: link.bytes_per_s) if pairs else self.node(place[0].node).link
        return InstanceLinks(tensor, tuple(self.link_between(a[0], b[0]) for a, b in pairwise(stages)))

    def check_places(self, places: Sequence[Place]) -> None:
        """Raise ConfigurationError when a place names a device that there is not, or that another has."""
        taken: set[DeviceRef] = set()
        for device in (device for place in places for device in place):
            num_devices = self.node(device.node).num_devices
            if not 0 <= device.index < num_devices:
                raise ConfigurationError(
                    f"there is no device {device}: {device.node} has {num_devices}, counted from 0"
                )
            if device in taken:
                raise ConfigurationError(f"two instances are on device {device}: give each its own")
            taken.add(device)

    def _add_link(self, link: NodeLink) -> None:
        for name in link.between:
            self.node(name)
        pair = frozenset(link.between)
        if len(pair) == 1:
            raise ConfigurationError(f"a link joins {link.between[0]} with itself: name two nodes")
        if pair in self._links:
            raise ConfigurationError(f"there are two links between {' and '.join(link.between)}: leave one out")
        self._links[pair] = link.network

    def _check(self) -> None:
        if not self.nodes:
            raise ConfigurationError("the cluster has no nodes: name at least one")
        for name, count in Counter(node.name for node in self.nodes).items():
            if count > 1:
                raise ConfigurationError(f"there are {count} nodes {name}: give each its own name")
        if self._network is None:
            for a, b in combinations(self._by_name, 2):
                self._between_nodes(a, b)

    def _between_nodes(self, a: NodeName, b: NodeName) -> Network:
        network = self._links.get(frozenset((a, b)), self._network)
        if network is None:
            raise ConfigurationError(f"nothing joins the nodes {a} and {b}: give the cluster a network, or them a link")
        return network


class Routes:
    """The routes between instances. Places on the same nodes have the same one, which is made once."""

    def __init__(self, topology: Topology, places: Mapping[InstanceId, Place]) -> None:
        self._topology = topology
        self._places = places
        self._nodes = {name: tuple(device.node for device in place) for name, place in places.items()}
        self._known: dict[tuple[tuple[NodeName, ...], tuple[NodeName, ...]], Route] = {}

    def between(self, source: InstanceId, target: InstanceId) -> Route:
        """Return how the KV of ``source`` gets to ``target``: see ``Topology.route``."""
        nodes = self._nodes[source], self._nodes[target]
        route = self._known.get(nodes)
        if route is None:
            route = self._known[nodes] = self._topology.route(self._places[source], self._places[target])
        return route


class InstanceSize(NamedTuple):
    """An instance that needs a place."""

    name: str
    tensor_parallel: int = 1
    pipeline_parallel: int = 1


def first_fit(topology: Topology, instances: Sequence[InstanceSize]) -> list[Place]:
    """Return a place for each instance, in order: on the first node that has room for all its devices.

    A pipeline that fits on no node goes stage by stage, each on the first node with room. Raises ConfigurationError,
    saying what is free, when there is none: a stage is never split.
    """
    free = {node.name: list(range(node.num_devices)) for node in topology.nodes}
    places: list[Place] = []
    for instance in instances:
        place = _take(free, instance.tensor_parallel * instance.pipeline_parallel)
        if place is None:
            place = ()
            for _ in range(instance.pipeline_parallel):
                stage = _take(free, instance.tensor_parallel)
                if stage is None:
                    left = ", ".join(f"{len(indices)} on {name}" for name, indices in free.items())
                    raise ConfigurationError(
                        f"{instance.name} needs {instance.tensor_parallel} free device(s) of one node for each of "
                        f"{instance.pipeline_parallel} stage(s), and there are {left}: place fewer instances, or give "
                        "the cluster more devices"
                    )
                place += stage
        places.append(place)
    return places


def read_devices(ranges: Sequence[str]) -> Place:
    """Return the devices that ``gpu-0:0-3`` or ``gpu-0:0``, ``gpu-0:1`` name, in order."""
    devices: list[DeviceRef] = []
    for text in ranges:
        node, _, indices = text.rpartition(":")
        first, _, last = indices.partition("-")
        devices += [DeviceRef(NodeName(node), index) for index in range(int(first), int(last or first) + 1)]
    return tuple(devices)


def write_devices(place: Place) -> tuple[str, ...]:
    """Return what ``read_devices`` reads, with ranges where devices follow each other."""
    runs: list[tuple[DeviceRef, int]] = []
    for device in place:
        if runs and (runs[-1][0].node, runs[-1][1] + 1) == (device.node, device.index):
            runs[-1] = runs[-1][0], device.index
        else:
            runs.append((device, device.index))
    return tuple(str(first) if first.index == last else f"{first}-{last}" for first, last in runs)


def _take(free: dict[NodeName, list[int]], count: int) -> Place | None:
    for name, indices in free.items():
        if len(indices) >= count:
            taken, indices[:count] = indices[:count], []
            return tuple(DeviceRef(name, index) for index in taken)
    return None


def _node_of(ref: DeviceRef | NodeName) -> NodeName:
    return ref.node if isinstance(ref, DeviceRef) else ref
