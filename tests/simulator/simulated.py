"""Small deployments and workloads for the simulator's tests."""

import csv
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from disagg.base.config import RouterSettings, SchedulerSettings
from disagg.base.ids import InstanceId, RequestId
from disagg.base.request import Role
from disagg.costs.latency import StepShape
from disagg.costs.links import LinkModel
from disagg.costs.topology import Topology
from disagg.simulator.cluster import ClusterSpec, SimulatedCluster
from disagg.simulator.instance_spec import InstanceSpec
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


def cluster_spec(*instances: InstanceSpec, link: LinkModel | None = None, **changes: Any) -> ClusterSpec:
    """``link`` joins the instances, all on one node."""
    router = RouterSettings(max_queued_requests=10**6, request_timeout_s=1e6)
    return ClusterSpec(**{"instances": instances, "router": router, "topology": Topology.one_node(link), **changes})


def pair(**changes: Any) -> ClusterSpec:
    return cluster_spec(instance(Role.PREFILL), instance(Role.DECODE), **changes)


def poisson(
    rate: float, count: int, seed: int, prompt: tuple[int, int] = (4, 400), output: tuple[int, int] = (1, 200)
) -> list[SimulatedRequest]:
    rng = random.Random(seed)
    requests, time_s = [], 0.0
    for number in range(count):
        time_s += rng.expovariate(rate)
        requests.append(SimulatedRequest(RequestId(f"r{number}"), time_s, rng.randint(*prompt), rng.randint(*output)))
    return requests


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
