"""What is to be planned: a model on a cluster, under a workload, held to a target."""

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from disagg.base.errors import ConfigurationError
from disagg.base.request import Role
from disagg.costs.links import KvCodec
from disagg.costs.platform import Platform
from disagg.costs.topology import Node, Topology
from disagg.measure.open_loop import OpenLoop
from disagg.measure.slo import SloTarget
from disagg.measure.windows import with_requests
from disagg.placement.instance_choice import BatchLimits, InstanceChoice
from disagg.simulator.engines import EngineRules

_SAMPLE_ROWS: Final = 400
"""Requests by whose lengths bounds are computed."""


class CostUnit(enum.Enum):
    """What a placement is charged by."""

    DEVICE = "device"
    DOLLAR = "dollar"
    """The cluster file's price per hour."""
    WATT = "watt"


@dataclass(frozen=True)
class LengthSample:
    """Lengths in tokens of some requests of a workload, and when they arrive at a rate of one a second."""

    prompts: tuple[int, ...]
    outputs: tuple[int, ...]
    arrivals: tuple[float, ...]
    shares_prefixes: bool = False
    """Some prompts name blocks that others may begin with as well."""

    @classmethod
    def of(cls, workload: OpenLoop) -> "LengthSample":
        """Return the lengths of requests that seed 0 draws."""
        rows = list(islice(with_requests(workload, _SAMPLE_ROWS).at_rate(1.0).draw(0), _SAMPLE_ROWS))
        prompts, outputs, arrivals = zip(
            *((row.prompt_len, row.output_len, row.arrival_s) for row in rows), strict=True
        )
        return cls(prompts, outputs, arrivals, shares_prefixes=any(row.prefix.ids for row in rows))

    @property
    def mean_prompt(self) -> float:
        """Mean tokens of a prompt."""
        return sum(self.prompts) / len(self.prompts)

    @property
    def mean_prompt_square(self) -> float:
        """Mean square of a prompt's length: attention's work."""
        return sum(length**2 for length in self.prompts) / len(self.prompts)

    @property
    def mean_output(self) -> float:
        """Mean tokens of an answer."""
        return sum(self.outputs) / len(self.outputs)

    @property
    def mean_held(self) -> float:
        """Mean over decode steps of the tokens that a decoding sequence holds."""
        steps = sum(self.outputs)
        held = sum((prompt + output / 2) * output for prompt, output in zip(self.prompts, self.outputs, strict=True))
        return held / steps

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return max(prompt + output for prompt, output in zip(self.prompts, self.outputs, strict=True))

    def prompt_quantile(self, part: float) -> int:
        """Return the prompt length that ``part`` of the prompts do not exceed."""
        return sorted(self.prompts)[max(0, math.ceil(part * len(self.prompts)) - 1)]


@dataclass(frozen=True, kw_only=True)
class PlanProblem:
    """A model on a cluster, under a workload, held to a target.

    ``platforms`` are by kind of device, as ``topology``'s nodes call them. ``target_rate`` in requests/s; None asks for
    as much as the cluster can serve. ``per`` is what goodput is divided by when placements are compared; None compares
    the rate of the whole cluster, or, with a target rate, the number of devices.
    """

    topology: Topology
    platforms: Mapping[str, Platform]
    rules: EngineRules
    batchings: Mapping[Role, tuple[BatchLimits, ...]]
    """How instances of a role may form steps, the usual one first."""
    workload: OpenLoop
    target: SloTarget
    target_rate: float | None = None
    per: CostUnit | None = None
    codecs: tuple[KvCodec, ...] = (KvCodec.RAW,)
    """In which KV may travel over networks of kind TCP: the first that serves as much as any is taken."""
    max_nodes: int = 4
    """That one instance may spread over."""
    min_requests: int = 300
    """Of a simulated run; more where answers take long."""
    max_requests: int = 1500
    num_seeds: int = 3
    """Of the runs that judge the last few placements."""
    sample: LengthSample = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sample", LengthSample.of(self.workload))
        if self.per is not None:
            for node in self.topology.nodes:
                self.device_cost(node, self.per)

    def nodes(self, kind: str) -> list[Node]:
        """Return the nodes of a kind of device."""
        return [node for node in self.topology.nodes if node.device == kind]

    def device_cost(self, node: Node, unit: CostUnit) -> float:
        """Return what one device of a node costs; raise ConfigurationError where the cluster file does not say."""
        if unit is CostUnit.DEVICE:
            return 1.0
        cost, key = (node.price_per_hour, "price_per_hour") if unit is CostUnit.DOLLAR else (node.watts, "watts")
        if not cost:
            raise ConfigurationError(
                f"what a {node.device} costs in {unit.value}s is not known: give devices: {{{node.device}: {{{key}: "
                "...}} in the cluster file, or compare per device"
            )
        return cost

    def kind_cost(self, kind: str, unit: CostUnit) -> float:
        """Return what one device of a kind costs."""
        return self.device_cost(self.nodes(kind)[0], unit)

    def compared_by(self) -> CostUnit:
        """Return what costs are counted in."""
        return self.per or CostUnit.DEVICE

    def cost(self, choice: InstanceChoice, unit: CostUnit) -> float:
        """Return what the devices of an instance cost."""
        return choice.num_devices * self.kind_cost(choice.kind, unit)
