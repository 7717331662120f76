"""How long KV blocks and activations travel: links as data, the way between two instances, the order of transfers."""

import enum
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from disagg.base.errors import ConfigurationError
from disagg.base.ids import InstanceId
from disagg.costs.fit import fit_relative


class LinkKind(enum.Enum):
    """What carries the bytes."""

    IN_PROCESS = "in-process"
    """The memory of one process."""
    SHM = "shm"
    """Memory that processes of one host share."""
    PCIE = "pcie"
    """Devices of one node without a link of their own."""
    NVLINK = "nvlink"
    RDMA = "rdma"
    TCP = "tcp"
    NIXL = "nixl"
    """What the NIXL library has found: it does not say what."""


class KvCodec(enum.Enum):
    """In which form KV blocks travel."""

    RAW = "raw"
    """As they are in the pool."""
    INT8 = "int8"
    """A byte for each element, and scales."""


@dataclass(frozen=True)
class LinkModel:
    """What a transfer that has the link for itself takes: ``overhead_s`` + ``latency_s`` + bytes / ``bytes_per_s``.

    ``latency_s`` is the link's, from the request for bytes to the first of them; ``overhead_s`` is what the two ends
    do for each transfer, such as a remote call. The default moves anything in no time.
    """

    bytes_per_s: float = math.inf
    """In one direction."""
    latency_s: float = 0.0
    overhead_s: float = 0.0
    kind: LinkKind = LinkKind.IN_PROCESS

    def __post_init__(self) -> None:
        if not self.bytes_per_s > 0:
            raise ConfigurationError(f"a link of {self.bytes_per_s} bytes/s moves nothing: give a positive bandwidth")
        for what, time_s in (("latency", self.latency_s), ("overhead", self.overhead_s)):
            if not 0 <= time_s < math.inf:
                raise ConfigurationError(f"a link's {what} of {time_s} s cannot be: give 0 or more seconds")

    def transfer_time_s(self, num_bytes: float) -> float:
        """Return the seconds from the start of a transfer to its end."""
        return self.latency_s + self.overhead_s + num_bytes / self.bytes_per_s


def fit_link(transfers: Sequence[tuple[int, float]], kind: LinkKind = LinkKind.SHM) -> LinkModel:
    """Return the link that explains measured transfers, given as (bytes, seconds), best.

    What each takes beside its bytes counts as latency: one end alone cannot tell it from overhead.
    """
    sizes = np.array([num_bytes for num_bytes, _ in transfers], dtype=np.float64)
    times = np.array([time_s for _, time_s in transfers])
    latency_s, byte_s = fit_relative(np.stack([np.ones_like(sizes), sizes], axis=1), times)
    if byte_s > 0:
        return LinkModel(1 / float(byte_s), float(latency_s), kind=kind)
    # Sizes too much alike tell no slope: then all of the time counts as bandwidth.
    return LinkModel(float(sizes.sum() / times.sum()), kind=kind)


_LEAST_DIGESTS_S: Final = 1e-7
"""Of the largest offer that was measured: less is rounding."""


class OfferCosts(NamedTuple):
    """What lies between a prompt's first token and the pull of its KV blocks: two messages, and their digests."""

    message_s: float
    digest_bytes_per_s: float | None
    """None where more bytes take no longer."""


def fit_offers(offers: Sequence[tuple[int, float]]) -> OfferCosts:
    """Return what explains measured offers, given as (bytes that are offered, seconds), best."""
    sizes = np.array([num_bytes for num_bytes, _ in offers], dtype=np.float64)
    times = np.array([time_s for _, time_s in offers])
    messages_s, byte_s = fit_relative(np.stack([np.ones_like(sizes), sizes], axis=1), times)
    is_seen = byte_s * sizes.max() > _LEAST_DIGESTS_S
    return OfferCosts(float(messages_s) / 2, 1 / float(byte_s) if is_seen else None)


@dataclass(frozen=True)
class InstanceLinks:
    """The links inside an instance: ``tensor`` joins the devices of a stage, ``stages`` each stage to the next."""

    tensor: LinkModel
    stages: tuple[LinkModel, ...]

    @classmethod
    def alike(cls, link: LinkModel, num_stages: int) -> "InstanceLinks":
        """Return those of an instance all of whose devices are joined by equal links."""
        return cls(link, (link,) * (num_stages - 1))


class Direction(enum.Enum):
    """Of the bytes, seen from a node."""

    OUT = "out"
    IN = "in"

    __hash__ = object.__hash__  # Enum's own is Python code, and every transfer looks up two ports


@dataclass(frozen=True)
class Ports:
    """What all transfers of a node share on their way out of it or into it: ``count`` ports of one network."""

    node: str
    direction: Direction
    link: LinkModel
    count: int = 1

    def __hash__(self) -> int:
        return hash((self.node, self.direction))  # those of a node have one network, and every transfer looks two up


@dataclass(frozen=True)
class Passage:
    """A link that ``num_parts`` of a transfer's equal parts must pass, ``num_lanes`` of them at a time.

    ``ports`` are those that other transfers pass too; None where the two instances have the link for themselves.
    """

    link: LinkModel
    num_parts: int = 1
    num_lanes: int = 1
    ports: Ports | None = None


@dataclass(frozen=True)
class Route:
    """How KV gets from one instance to another: in ``num_parts`` equal parts, which pass all ``passages`` at once.

    Instances of several devices hold a part of the KV on each and send the parts side by side.
    """

    passages: tuple[Passage, ...]
    num_parts: int = 1

    @classmethod
    def over(cls, link: LinkModel, num_parts: int = 1) -> "Route":
        """Return a route of which each part has such a link for itself."""
        return cls((Passage(link, num_parts, num_parts),), num_parts)

    def passage_time_s(self, passage: Passage, num_bytes: int) -> float:
        """Return how long a transfer that waits for nobody keeps one of the passages busy."""
        return passage.link.transfer_time_s(-(-num_bytes * passage.num_parts // (self.num_parts * passage.num_lanes)))

    def transfer_time_s(self, num_bytes: int) -> float:
        """Return the seconds from the start of a transfer that waits for nobody to its end."""
        return max(self.passage_time_s(passage, num_bytes) for passage in self.passages)


_MOST_PAIRS: Final = 4096
"""Pairs of instances of which it is remembered when they are free, before those that are free are forgotten."""

_PROBE_BYTES: Final = 1 << 30
_FREE: Final = 1e15
"""Bytes/s that are told of a link which moves anything in no time."""


class SerialLinks:
    """Transfers between instances. Those of the same pair run one after the other, first come first.

    So do those of any pairs on the same ports of a network. ``route`` says how to get from one instance to another; it
    is asked for each transfer.
    """

    def __init__(self, route: Callable[[InstanceId, InstanceId], Route]) -> None:
        self._route = route
        self._free_at_s: dict[tuple[InstanceId, InstanceId], float] = {}
        self._ports_free_at_s: dict[Ports, list[float]] = {}

    def start(self, source: InstanceId, target: InstanceId, num_bytes: int, now: float) -> float:
        """Queue a transfer at ``now`` and return when it ends."""
        pair = (source, target)
        route = self._route(source, target)
        begin_s = max(now, self._free_at_s.get(pair, 0.0))
        passed = [(one, None if one.ports is None else self._free_ports(one.ports)) for one in route.passages]
        for passage, free_at_s in passed:
            if free_at_s is not None:
                begin_s = max(begin_s, free_at_s[passage.num_lanes - 1])
        longest_s = 0.0
        for passage, free_at_s in passed:
            time_s = route.passage_time_s(passage, num_bytes)
            longest_s = max(longest_s, time_s)
            if free_at_s is None:
                continue
            free_at_s[: passage.num_lanes] = [begin_s + time_s] * passage.num_lanes
            if len(free_at_s) > passage.num_lanes:
                free_at_s.sort()
        end_s = begin_s + longest_s
        if len(self._free_at_s) >= _MOST_PAIRS:
            self._free_at_s = {one: free_s for one, free_s in self._free_at_s.items() if free_s > now}
        self._free_at_s[pair] = end_s
        return end_s

    def speed(self, source: InstanceId, target: InstanceId) -> tuple[float, float]:
        """Return seconds to the first byte and bytes/s of a transfer that waits for nobody."""
        route = self._route(source, target)
        latency_s = route.transfer_time_s(0)
        return latency_s, min(_PROBE_BYTES / max(route.transfer_time_s(_PROBE_BYTES) - latency_s, 1e-12), _FREE)

    @property
    def num_pairs(self) -> int:
        """Pairs of instances of which it is remembered when they are free."""
        return len(self._free_at_s)

    def kind(self, source: InstanceId, target: InstanceId) -> LinkKind:
        """Return what carries the bytes: of several links one after the other, the last."""
        return self._route(source, target).passages[-1].link.kind

    def _free_ports(self, ports: Ports) -> list[float]:
        """Return when each of these ports is free, the first one first."""
        free_at_s = self._ports_free_at_s.get(ports)
        if free_at_s is None:
            free_at_s = self._ports_free_at_s[ports] = [0.0] * ports.count
        return free_at_s
