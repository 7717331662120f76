"""Small deployments and workloads for the simulator's tests."""

import csv
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from disagg.base.block_hash import hash_blocks
from disagg.base.config import RouterSettings, SchedulerSettings, SchedulingMode
from disagg.base.ids import InstanceId, RequestId
from disagg.base.objectives import Objectives
from disagg.base.request import Role
from disagg.costs.latency import LatencyModel, StepShape
from disagg.costs.links import LinkModel
from disagg.costs.topology import Topology
from disagg.scheduling.host_cores import cores_to_borrow
from disagg.simulator.cluster import ClusterSpec, SimulatedCluster
from disagg.simulator.instance_spec import InstanceSpec, LendingCores
from disagg.simulator.recording import Recording
from disagg.simulator.request import SimulatedRequest


class LinearLatency:
    """Milliseconds that no two different steps share: 1 + 0.01 per prompt token, 0.1 per decode, a bit per context."""

    def __init__(self, num_stages: int = 1) -> None:
        self.num_stages = num_stages

    def stage_times_s(self, shape: StepShape) -> tuple[float, ...]:
        time_ms = 1 + 0.01 * shape.num_prefill_tokens + 0.1 * shape.num_decodes + 1.7e-4 * shape.decode_context
        return (time_ms / 1e3 / self.num_stages,) * self.num_stages


def instance(role: Role, number: int = 0, **changes: Any) -> InstanceSpec:
    settings = {name: changes.pop(name) for name in SchedulerSettings.__struct_fields__ if name in changes}
    return InstanceSpec(
        **{
            "name": InstanceId(f"{role.value}-{number}"),
            "role": role,
            "scheduler": SchedulerSettings(**{"max_batch_tokens": 256, "max_batch_size": 32, **settings}),
            "num_blocks": 512,
            "block_size": 16,
            "latency": LinearLatency(),
            "kv_bytes_per_token": 1000,
            **changes,
        }
    )


def slack_instances(
    roles: Sequence[Role], latency: LatencyModel, objectives: Objectives, **changes: Any
) -> list[InstanceSpec]:
    """Instances that keep objectives with steps of at most 512 tokens, and tell the router what these cost."""
    settings = {"max_batch_tokens": 512, "tells_costs": True, "num_blocks": 4096, **changes}
    return [
        instance(role, number, scheduling=SchedulingMode.SLACK, objectives=objectives, latency=latency, **settings)
        for number, role in enumerate(roles)
    ]


def cluster_spec(*instances: InstanceSpec, link: LinkModel | None = None, **changes: Any) -> ClusterSpec:
    """``link`` joins the instances, all on one node."""
    router = RouterSettings(max_queued_requests=10**6, request_timeout_s=1e6)
    return ClusterSpec(**{"instances": instances, "router": router, "topology": Topology.one_node(link), **changes})


def pair(**changes: Any) -> ClusterSpec:
    return cluster_spec(instance(Role.PREFILL), instance(Role.DECODE), **changes)


def lending(spec: ClusterSpec, wider: float = 0.5, step_s: float = 0.0) -> ClusterSpec:
    """Let the instances, on one core for each of their threads, lend each other theirs.

    On so many cores as twice its own a step takes the part ``wider`` of its time, and ``step_s`` more.
    """
    cores, first = [], 0
    for one in spec.instances:
        cores.append(tuple(range(first, first + one.num_threads)))
        first += one.num_threads
    instances = [
        replace(one, cores=LendingCores(own=own, others=others, latencies=latencies(one, others, wider, step_s)))
        for one, own, others in zip(spec.instances, cores, cores_to_borrow(cores), strict=True)
    ]
    return replace(spec, instances=tuple(instances))


def latencies(spec: InstanceSpec, others: Sequence[int], wider: float, step_s: float) -> dict[int, LatencyModel]:
    parts = {number: 1 - (1 - wider) * number / spec.num_threads for number in range(1, len(others) + 1)}
    return {number: PartOf(spec.latency, part, step_s) for number, part in parts.items()}


@dataclass(frozen=True)
class PartOf:
    """A part of what another model says, and some seconds more."""

    latency: LatencyModel
    part: float
    more_s: float = 0.0
    num_stages: int = 1

    def stage_times_s(self, shape: StepShape) -> tuple[float, ...]:
        (time_s,) = self.latency.stage_times_s(shape)
        return (time_s * self.part + self.more_s,)


def poisson(
    rate: float, count: int, seed: int, prompt: tuple[int, int] = (4, 400), output: tuple[int, int] = (1, 200)
) -> list[SimulatedRequest]:
    rng = random.Random(seed)
    requests, time_s = [], 0.0
    for number in range(count):
        time_s += rng.expovariate(rate)
        requests.append(SimulatedRequest(RequestId(f"r{number}"), time_s, rng.randint(*prompt), rng.randint(*output)))
    return requests


def name_blocks(request: SimulatedRequest, tokens: Sequence[int], after: bytes = b"", size: int = 16) -> None:
    """Name the blocks of a request, of prompt and answer, by what its tokens are."""
    request.block_hashes, request.hash_block_size = hash_blocks(tokens, size, after), size


def serve(spec: ClusterSpec, requests: Iterable[SimulatedRequest], **options: Any) -> list[SimulatedRequest]:
    """Run to the end and return the requests in the order in which they ended."""
    ended: list[SimulatedRequest] = []
    SimulatedCluster(spec, ended.append, Recording(**options)).run(requests)
    return ended


def stamps(requests: Sequence[SimulatedRequest]) -> list[tuple[Any, ...]]:
    return [
        (r.request_id, r.outcome, r.num_output_tokens, str(r.timeline))
        for r in sorted(requests, key=lambda request: request.request_id)
    ]


def measured_run(reference_data: Path, run: str) -> list[dict[str, float]]:
    """The requests of one of DistServe's measured runs, with what was measured."""
    with (reference_data / "distserve" / "opt13b_sharegpt_a100_calibration.csv").open(encoding="utf-8") as lines:
        rows = [row for row in csv.DictReader(lines) if row.pop("run") == run]
    return [{name: float(value) for name, value in row.items()} for row in rows]
