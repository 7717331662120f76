"""What a cluster file says (YAML, docs/simulator.md), and the topology that it describes."""

import re
from collections.abc import Mapping
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from disagg.base.errors import ConfigurationError
from disagg.costs.devices import DEVICES
from disagg.costs.links import LinkKind, LinkModel
from disagg.costs.topology import SHARED_MEMORY, Network, Node, NodeLink, NodeName, Topology

_PREFIXES: Final = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_BANDWIDTH_UNITS: Final = {"": 1.0} | {
    prefix + unit: factor / divisor
    for prefix, factor in _PREFIXES.items()
    for unit, divisor in (("B/s", 1), ("bit/s", 8), ("bps", 8))
}
_TIME_UNITS: Final = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_QUANTITY: Final = re.compile(r"\s*(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)\s*(\S*)\s*")

PROFILED: Final = "profiled"
"""The kind of devices of which a profile knows everything and no data sheet anything."""

Bandwidth = Annotated[float | str, Meta(description="bytes/s, or a number with a unit: 25 Gbit/s, 300 GB/s")]
Duration = Annotated[float | str, Meta(description="seconds, or a number with a unit: 10 us, 0.5 ms")]


class LinkEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A link, with units."""

    kind: LinkKind
    bandwidth: Bandwidth
    latency: Duration = 0.0
    overhead: Duration = 0.0

    def model(self) -> LinkModel:
        """Return it in bytes and seconds."""
        return LinkModel(
            _quantity(self.bandwidth, _BANDWIDTH_UNITS, "bandwidth", "25 Gbit/s or 300 GB/s"),
            _quantity(self.latency, _TIME_UNITS, "latency", "10 us or 0.5 ms"),
            _quantity(self.overhead, _TIME_UNITS, "overhead", "10 us or 0.5 ms"),
            self.kind,
        )


class NetworkEntry(LinkEntry, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What joins nodes. Each has ``ports`` of them, which its devices share."""

    ports: Annotated[int, Meta(ge=1)] = 1

    def network(self) -> Network:
        """Return it in bytes and seconds."""
        return Network(self.model(), self.ports)


class NodeLinkEntry(NetworkEntry, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What joins two nodes in place of the common network."""

    between: tuple[str, str]


class NodeEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``count`` equal nodes, called ``name`` where there is one, and else ``name-0``, ``name-1``, ..."""

    name: Annotated[str, Meta(min_length=1)] = "node"
    count: Annotated[int, Meta(ge=1)] | None = None
    device: str
    """Name of a data sheet, or ``profiled``."""
    devices: Annotated[int, Meta(ge=1)]
    """On each node."""
    link: LinkEntry | None = None
    """Between its devices; None: what the step times or the data sheet say."""
    host_link: LinkEntry | None = None
    """Between processes of the host; None: shared memory as measured on one machine."""


class DeviceEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a device of a kind costs. ``watts`` None: the data sheet's."""

    price_per_hour: Annotated[float, Meta(ge=0)] | None = None
    watts: Annotated[float, Meta(ge=0)] | None = None


class ClusterFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A cluster. Raises ConfigurationError for what cannot be: see ``Topology``."""

    nodes: Annotated[tuple[NodeEntry, ...], Meta(min_length=1)]
    network: NetworkEntry | None = None
    """Between any two nodes for which ``links`` say nothing."""
    links: tuple[NodeLinkEntry, ...] = ()
    devices: Mapping[str, DeviceEntry] = {}
    """By the name of the kind."""

    def __post_init__(self) -> None:
        for kind in self.devices:
            if kind not in self.kinds:
                raise ConfigurationError(f"devices: the cluster has no device {kind!r}, only {', '.join(self.kinds)}")
        self.topology(LinkModel())

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of devices that there are, in the order of the nodes."""
        return tuple(dict.fromkeys(node.device for node in self.nodes))

    def topology(self, within: LinkModel | None = None) -> Topology:
        """Return the nodes and links; ``within`` joins the devices of nodes that name no link.

        None takes the data sheets' links; raises ConfigurationError where there is none.
        """
        nodes = [node for entry in self.nodes for node in self._nodes(entry, within)]
        links = [NodeLink(_pair(entry.between), entry.network()) for entry in self.links]
        return Topology(nodes, None if self.network is None else self.network.network(), links)

    def _nodes(self, entry: NodeEntry, within: LinkModel | None) -> list[Node]:
        names = [entry.name] if entry.count is None else [f"{entry.name}-{number}" for number in range(entry.count)]
        sheet, costs = DEVICES.get(entry.device), self.devices.get(entry.device, DeviceEntry())
        if sheet is None and entry.device != PROFILED:
            raise ConfigurationError(
                f"node {names[0]}: no data sheet of a device {entry.device!r}; there are {', '.join(DEVICES)}, and "
                f"{PROFILED} for what a profile describes"
            )
        link = within if entry.link is None else entry.link.model()
        if link is None and sheet is not None:
            link = sheet.peer
        if link is None:
            raise ConfigurationError(f"node {names[0]}: {PROFILED} devices have no data sheet: give their link")
        watts = sheet.watts if sheet and costs.watts is None else costs.watts
        return [
            Node(
                name=NodeName(name),
                device=entry.device,
                num_devices=entry.devices,
                link=link,
                host_link=SHARED_MEMORY if entry.host_link is None else entry.host_link.model(),
                price_per_hour=costs.price_per_hour,
                watts=watts,
            )
            for name in names
        ]


def _pair(names: tuple[str, str]) -> tuple[NodeName, NodeName]:
    return NodeName(names[0]), NodeName(names[1])


def _quantity(value: float | str, units: Mapping[str, float], what: str, examples: str) -> float:
    if isinstance(value, int | float):
        return float(value)
    match = _QUANTITY.fullmatch(value)
    if match is None or match[2] not in units:
        known = ", ".join(unit for unit in units if unit)
        raise ConfigurationError(f"a link's {what} of {value!r} is none: write {examples}; units are {known}")
    return float(match[1]) * units[match[2]]
