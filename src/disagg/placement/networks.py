"""What the network between nodes carries of hand-overs, and in which form of KV blocks it carries the most.

A request's KV must be there before its answer's TPOT is spent. So a network is full long before its bandwidth is: the
sample's prompts go through it one after the other (Lindley's recursion), and as many answers as must have to keep their
TPOT, with decode steps that take no time. That makes it a bound but for the order in which prompts end.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from disagg.costs.coded_links import CodecCost
from disagg.costs.links import KvCodec, LinkKind, Ports
from disagg.costs.platform import Platform
from disagg.costs.topology import DeviceRef
from disagg.placement.problem import PlanProblem

_PORT_SHARE: Final = 0.9
"""Of a network port's bandwidth that hand-overs may take before they queue for ever."""
_HALVINGS: Final = 12
_LEAST_PART: Final = 1e-3
"""Of a port's bandwidth: where it carries less in time, it counts as nothing."""


@dataclass(frozen=True)
class NodeNetwork:
    """What joins nodes: ``port_rate`` requests/s whose KV the ports of one node carry in time, in this form.

    Infinite where nothing leaves a node. ``num_nodes`` have such ports; a part ``crossing`` of hand-overs takes them.
    """

    port_rate: float = math.inf
    codec: KvCodec = KvCodec.RAW
    num_nodes: int = 1
    crossing: float = 1.0

    def rate(self, num_sources: int, num_targets: int) -> float:
        """Return the requests/s from prefill instances on so many nodes to decode instances on so many."""
        return self.port_rate * min(self.num_nodes, num_sources, num_targets) / self.crossing


class Networks:
    """The networks of a problem, each looked at once."""

    def __init__(self, problem: PlanProblem) -> None:
        self._problem = problem
        self._known: dict[tuple[str, str], tuple[NodeNetwork, ...]] = {}

    def between(self, prefill_kind: str, decode_kind: str) -> tuple[NodeNetwork, ...]:
        """Return what the network carries in each form that the engine may use, between instances on any nodes."""
        kinds = prefill_kind, decode_kind
        if kinds not in self._known:
            self._known[kinds] = tuple(self._rates(*kinds))
        return self._known[kinds]

    def _rates(self, prefill_kind: str, decode_kind: str) -> Sequence[NodeNetwork]:
        problem = self._problem
        sources, targets = problem.nodes(prefill_kind), problem.nodes(decode_kind)
        pairs = [(a, b) for a in sources for b in targets if a.name != b.name]
        if not pairs:
            return [NodeNetwork()]
        source, target = pairs[0]
        route = problem.topology.route((DeviceRef(source.name, 0),), (DeviceRef(target.name, 0),))
        ports = next((passage.ports for passage in route.passages if passage.ports is not None), None)
        if ports is None:
            return [NodeNetwork()]
        num_nodes, crossing = min(len(sources), len(targets)), len(pairs) / (len(sources) * len(targets))
        codecs = problem.codecs if ports.link.kind is LinkKind.TCP else problem.codecs[:1]
        num_bytes = _prompt_bytes(problem, problem.platforms[prefill_kind])
        return [
            NodeNetwork(_port_rate(problem, ports, num_bytes, codec), codec, num_nodes, crossing) for codec in codecs
        ]


def _prompt_bytes(problem: PlanProblem, platform: Platform) -> list[float]:
    """Return what each prompt of the sample has to travel, without what sliding windows no longer see."""
    window = platform.kv_window
    spared = [0.0 if window is None else window.spared_bytes(length) for length in problem.sample.prompts]
    lengths = zip(problem.sample.prompts, spared, strict=True)
    return [platform.kv_bytes_per_token * length - less for length, less in lengths]


def _port_rate(problem: PlanProblem, ports: Ports, prompt_bytes: Sequence[float], codec: KvCodec) -> float:
    """Return the requests/s that the ports of one node carry in time."""
    sample, cost = problem.sample, CodecCost()
    share, coding_s = (1.0, 0.0) if codec is KvCodec.RAW else (cost.bytes_share, 1 / cost.bytes_per_s)
    busy_s = [ports.link.transfer_time_s(share * num_bytes) / ports.count for num_bytes in prompt_bytes]
    full = _PORT_SHARE * len(busy_s) / sum(busy_s)
    tpot_s = problem.target.slo.tpot_s
    if math.isinf(tpot_s):
        return full

    def attainment(rate: float) -> float:
        free_at_s, num_met = 0.0, 0
        rows = zip(sample.arrivals, prompt_bytes, sample.outputs, busy_s, strict=True)
        for arrival, num_bytes, output_len, port_s in rows:
            free_at_s = max(arrival / rate, free_at_s) + port_s
            there_s = free_at_s + coding_s * num_bytes - arrival / rate
            num_met += there_s <= tpot_s * (output_len - 1) or output_len == 1
        return num_met / len(sample.prompts)

    low, high = _LEAST_PART * full, full
    for _ in range(_HALVINGS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if attainment(middle) >= problem.target.attainment else (low, middle)
    return high if high == full else low
