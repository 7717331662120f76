"""A platform whose arithmetic fits in the head, and problems on it."""

from dataclasses import dataclass
from typing import Any, Self

from disagg.base.errors import ConfigurationError
from disagg.base.request import Role
from disagg.costs.latency import StepShape
from disagg.costs.links import InstanceLinks, LinkKind, LinkModel
from disagg.costs.platform import HostCosts
from disagg.costs.topology import Network, Node, NodeName, Topology
from disagg.measure.arrivals import ArrivalKind, Arrivals
from disagg.measure.open_loop import FixedLengths, OpenLoop
from disagg.measure.slo import SloTarget, parse_target
from disagg.placement.instance_choice import BatchLimits
from disagg.placement.problem import PlanProblem
from disagg.simulator.engines import own_rules

NO_HOST = HostCosts()
NVLINK = LinkModel(300e9, kind=LinkKind.NVLINK)


@dataclass(frozen=True)
class EvenLatency:
    """A prompt token takes ``token_s``, a step of decodes ``step_s`` and a twentieth more for each.

    Both are divided evenly among the devices.
    """

    token_s: float
    step_s: float
    num_devices: int
    num_stages: int = 1

    def stage_times_s(self, shape: StepShape) -> tuple[float, ...]:
        time_s = self.token_s * shape.num_prefill_tokens
        if shape.num_decodes:
            time_s += self.step_s * (1 + shape.num_decodes / 20)
        return (time_s / self.num_devices,) * self.num_stages


@dataclass(frozen=True)
class EvenPlatform:
    """``weights`` devices are filled by the weights; each device beyond holds ``tokens`` of KV."""

    token_s: float = 1e-4
    step_s: float = 10e-3
    tokens: int = 20_000
    weights: float = 0.0
    kv_bytes_per_token: int = 1000
    name: str = "even"
    link: LinkModel = NVLINK
    kv_window: None = None
    interference: None = None
    host: HostCosts = NO_HOST
    num_threads: None = None

    def latency(self, tensor: int, pipeline: int, links: InstanceLinks | None = None) -> EvenLatency:
        if tensor not in (1, 2):
            raise ConfigurationError(f"heads do not divide by {tensor}")
        return EvenLatency(self.token_s, self.step_s, tensor * pipeline, pipeline)

    def at_threads(self, num_threads: int | None) -> Self:
        return self

    def capacity_tokens(self, tensor: int, pipeline: int) -> int:
        left = tensor * pipeline - self.weights
        if left <= 0:
            raise ConfigurationError(f"the weights leave no room for KV on {tensor * pipeline} device(s)")
        return int(self.tokens * left)


def nodes(count: int, num_devices: int, kind: str = "gpu", **costs: Any) -> list[Node]:
    return [
        Node(name=NodeName(f"{kind}-{number}"), device=kind, num_devices=num_devices, link=NVLINK, **costs)
        for number in range(count)
    ]


def topology(*groups: list[Node], bytes_per_s: float = 1e9) -> Topology:
    """``bytes_per_s`` is that of the network between nodes."""
    return Topology([node for group in groups for node in group], Network(LinkModel(bytes_per_s, kind=LinkKind.TCP)))


def workload(prompt_len: int = 1000, output_len: int = 20) -> OpenLoop:
    return OpenLoop(FixedLengths(prompt_len, output_len, 100), Arrivals(ArrivalKind.POISSON, 1.0))


def problem(**changes: Any) -> PlanProblem:
    """One node of three devices, and objectives that one device keeps with ease."""
    target = changes.pop("target", "ttft=400ms,tpot=30ms")
    return PlanProblem(
        **{
            "topology": topology(nodes(1, 3)),
            "platforms": {"gpu": EvenPlatform()},
            "rules": own_rules(),
            "batchings": dict.fromkeys(Role, (BatchLimits(None, 2048, 64),)),
            "workload": workload(),
            "target": target if isinstance(target, SloTarget) else parse_target(target),
            "min_requests": 40,
            "max_requests": 80,
            "num_seeds": 1,
            **changes,
        }
    )
