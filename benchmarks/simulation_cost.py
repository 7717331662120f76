"""What a simulation costs: requests simulated in a second of CPU time, and memory, for a pair and for a fleet.

    python benchmarks/simulation_cost.py [--only pair|fleet|index] [--instances 1000] [--requests 100000]
        [--router] [--json]

The pair is one prefill and one decode instance at 30 requests/s, the best of four runs. The fleet is as many instances
of Llama 3 8B on L40S devices, ten to a node, by their data sheet: half of them prefill, half decode. Its network gives
each node one port of 400 Gbit/s, which all its hand-overs share. A chat workload comes at a rate per instance.
`--router` counts what the router's core of the fleet does, its clock included, and how many bytes are handed over.
"""

import argparse
import gc
import random
import resource
import time
import tracemalloc
from collections.abc import Iterator

import msgspec

from disagg.base.config import InstanceGroup, Placement, RouterSettings, SchedulerSettings
from disagg.base.ids import BlockHash, InstanceId, RequestId
from disagg.base.kv_events import BlockStored, Medium
from disagg.base.request import Role
from disagg.cache.prefix_index import PrefixIndex
from disagg.costs.devices import find_device
from disagg.costs.latency import StepShape
from disagg.costs.links import LinkKind, LinkModel, SerialLinks
from disagg.costs.roofline import RooflinePlatform
from disagg.costs.topology import Network, Node, NodeName, Topology
from disagg.measure.slo import parse_slo
from disagg.measure.standard import standard_workload
from disagg.models.known_shapes import KNOWN_SHAPES
from disagg.scheduling.router.core import RouterCore
from disagg.scheduling.router.inputs import AnyRouterInput
from disagg.scheduling.router.outputs import AnyRouterOutput, AnySend
from disagg.simulator.cluster import ClusterSpec, SimulatedCluster
from disagg.simulator.engines import build_cluster, own_rules
from disagg.simulator.instance_spec import InstanceSpec
from disagg.simulator.request import SimulatedRequest
from disagg.simulator.simulated_requests import simulated_requests
from disagg.simulator.simulation import simulate

PAIR_REQUESTS = 3000
DEVICES_PER_NODE = 10
RATE_PER_INSTANCE = 3.0
PORT = LinkModel(50e9, 5e-6, kind=LinkKind.RDMA)


class PairCost(msgspec.Struct, frozen=True, kw_only=True):
    """Requests per second of CPU time, and calls of the event queue."""

    num_requests: int
    requests_per_s: float
    num_events: int


class RouterWork(msgspec.Struct, frozen=True, kw_only=True):
    """Of the router's core: CPU seconds and inputs, messages that it sends, and KV bytes that instances read."""

    busy_s: float
    num_inputs: int
    num_sent: int
    kv_bytes: int


class FleetCost(msgspec.Struct, frozen=True, kw_only=True):
    """One run. Seconds are of CPU time, but for ``span_s``, which is simulated; memory is the process's peak."""

    num_instances: int
    num_nodes: int
    num_requests: int
    num_finished: int
    rate: float
    build_s: float
    run_s: float
    requests_per_s: float
    span_s: float
    base_bytes: int
    peak_bytes: int
    attainment: float
    router: RouterWork | None


class RouterMeter:
    """Stands between the simulated router and its core, and between instances and their links."""

    def __init__(self) -> None:
        self._handle, self._start = RouterCore.handle, SerialLinks.start
        self._busy_s, self._num_inputs, self._num_sent, self._kv_bytes = 0.0, 0, 0, 0

    def attach(self) -> None:
        def handle(core: RouterCore, one: AnyRouterInput, now: float) -> list[AnyRouterOutput]:
            begin_s = time.thread_time()
            outputs = self._handle(core, one, now)
            self._busy_s += time.thread_time() - begin_s
            self._num_inputs += 1
            self._num_sent += sum(isinstance(output, AnySend) for output in outputs)
            return outputs

        def start(links: SerialLinks, source: InstanceId, target: InstanceId, num_bytes: int, now: float) -> float:
            self._kv_bytes += num_bytes
            return self._start(links, source, target, num_bytes, now)

        RouterCore.handle, SerialLinks.start = handle, start  # type: ignore[method-assign]

    def work(self) -> RouterWork:
        return RouterWork(
            busy_s=self._busy_s, num_inputs=self._num_inputs, num_sent=self._num_sent, kv_bytes=self._kv_bytes
        )


class IndexCost(msgspec.Struct, frozen=True, kw_only=True):
    """The router's index of prefixes: bytes for each block of its own name, seconds to look a prompt up."""

    bytes_per_block: float
    blocks_per_instance: int
    unknown_s: float
    held_by_all_s: float


class Costs(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for."""

    pair: PairCost | None
    fleet: FleetCost | None
    index: IndexCost | None


class LinearLatency:
    """Milliseconds that no two different steps share: 1 + 0.01 per prompt token, 0.1 per decode, a bit per context."""

    num_stages = 1

    def stage_times_s(self, shape: StepShape) -> tuple[float, ...]:
        time_ms = 1 + 0.01 * shape.num_prefill_tokens + 0.1 * shape.num_decodes + 1.7e-4 * shape.decode_context
        return (time_ms / 1e3,)


def pair() -> ClusterSpec:
    instances = tuple(
        InstanceSpec(
            name=InstanceId(f"{role.value}-0"),
            role=role,
            scheduler=SchedulerSettings(max_batch_tokens=256, max_batch_size=32),
            num_blocks=512,
            block_size=16,
            latency=LinearLatency(),
            kv_bytes_per_token=1000,
        )
        for role in (Role.PREFILL, Role.DECODE)
    )
    return ClusterSpec(instances=instances, router=RouterSettings(max_queued_requests=10**6, request_timeout_s=1e6))


def poisson(rate: float, count: int, seed: int) -> Iterator[SimulatedRequest]:
    rng = random.Random(seed)
    time_s = 0.0
    for number in range(count):
        time_s += rng.expovariate(rate)
        yield SimulatedRequest(RequestId(f"r{number}"), time_s, rng.randint(4, 400), rng.randint(1, 200))


def pair_cost() -> PairCost:
    times, num_events = [], 0
    for _ in range(4):
        requests = list(poisson(30, PAIR_REQUESTS, 1))
        cluster = SimulatedCluster(pair(), lambda request: None)
        gc.collect()
        begin_s = time.process_time()
        cluster.run(requests)
        times.append(time.process_time() - begin_s)
        num_events = cluster.queue.num_run
    return PairCost(num_requests=PAIR_REQUESTS, requests_per_s=PAIR_REQUESTS / min(times), num_events=num_events)


def fleet(num_instances: int) -> ClusterSpec:
    num_nodes = -(-num_instances // DEVICES_PER_NODE)
    device = find_device("l40s")
    nodes = [
        Node(name=NodeName(f"node-{number}"), device=device.name, num_devices=DEVICES_PER_NODE, link=device.peer)
        for number in range(num_nodes)
    ]
    num_prefill = num_instances // 2
    placement = Placement(
        groups=(
            InstanceGroup(role=Role.PREFILL, count=num_prefill),
            InstanceGroup(role=Role.DECODE, count=num_instances - num_prefill),
        )
    )
    router = RouterSettings(max_queued_requests=10**6, request_timeout_s=1e6)
    platform = RooflinePlatform(KNOWN_SHAPES["llama-3-8b"], device, "llama-3-8b")
    return build_cluster(placement, platform, own_rules(router=router), Topology(nodes, Network(PORT)))


def fleet_cost(num_instances: int, num_requests: int, rate: float, meter: RouterMeter | None) -> FleetCost:
    begin_s = time.process_time()
    spec = fleet(num_instances)
    SimulatedCluster(spec, lambda request: None)
    built_s = time.process_time()
    base_bytes = peak_bytes()
    if meter is not None:
        meter.attach()
    workload = standard_workload("chat", rate, num_requests)
    requests = simulated_requests(workload.draw(0), "chat", spec.instances[0].block_size)
    report = simulate(spec, requests, parse_slo("ttft=1s,tpot=50ms"))
    run_s = time.process_time() - built_s
    return FleetCost(
        num_instances=num_instances,
        num_nodes=len(spec.topology.nodes),
        num_requests=report.num_requests,
        num_finished=report.num_finished,
        rate=rate,
        build_s=built_s - begin_s,
        run_s=run_s,
        requests_per_s=num_requests / run_s,
        span_s=report.span_s,
        base_bytes=base_bytes,
        peak_bytes=peak_bytes(),
        attainment=report.attainment,
        router=None if meter is None else meter.work(),
    )


def index_cost(num_instances: int) -> IndexCost:
    """Let instances hold blocks of their own, and then all of them the same nine."""
    rng = random.Random(1)
    index, num_blocks, num_each = PrefixIndex(), fleet(num_instances).instances[0].num_blocks, 200
    names = [InstanceId(f"instance-{number}") for number in range(num_instances)]
    for name in names:
        index.join(name, 64, num_blocks)
    tracemalloc.start()
    for number in range(num_each):
        for name in names:
            index.take(name, number, (stored(rng.randbytes(16)),))
    bytes_per_block = tracemalloc.get_traced_memory()[0] / (num_each * num_instances)
    tracemalloc.stop()
    shared = [rng.randbytes(16) for _ in range(9)]
    for name in names:
        index.take(name, num_each, (stored(*shared),))
    return IndexCost(
        bytes_per_block=bytes_per_block,
        blocks_per_instance=num_blocks,
        unknown_s=find_s(index, [rng.randbytes(16) for _ in range(9)]),
        held_by_all_s=find_s(index, shared),
    )


def stored(*names: bytes) -> BlockStored:
    return BlockStored(tuple(map(BlockHash, names)), None, (), 64, None, Medium.GPU)


def find_s(index: PrefixIndex, names: list[bytes]) -> float:
    begin_s = time.thread_time()
    for _ in range(200):
        index.find([BlockHash(name) for name in names], 64)
    return (time.thread_time() - begin_s) / 200


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("pair", "fleet", "index"))
    parser.add_argument("--instances", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--rate", type=float, help="requests/s of the whole fleet [default: 3 for each instance]")
    parser.add_argument("--router", action="store_true", help="count what the fleet's router does")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rate = arguments.rate or RATE_PER_INSTANCE * arguments.instances
    meter = RouterMeter() if arguments.router else None
    costs = Costs(
        pair=pair_cost() if arguments.only in (None, "pair") else None,
        fleet=(
            fleet_cost(arguments.instances, arguments.requests, rate, meter)
            if arguments.only in (None, "fleet")
            else None
        ),
        index=index_cost(arguments.instances) if arguments.only in (None, "index") else None,
    )
    if arguments.json:
        print(msgspec.json.encode(costs).decode())
        return
    if costs.pair is not None:
        print(f"pair: {costs.pair.requests_per_s:,.0f} requests/s of CPU time, {costs.pair.num_events:,} events")
    if (one := costs.fleet) is not None:
        print(
            f"fleet of {one.num_instances:,} instances on {one.num_nodes:,} nodes, {one.num_requests:,} requests at "
            f"{one.rate:,.0f}/s: {one.requests_per_s:,.0f} requests/s of CPU time ({one.run_s:.1f} s, and "
            f"{one.build_s:.1f} s to build), {one.span_s:.0f} s simulated, {one.num_finished:,} finished, "
            f"{one.attainment:.1%} within 1 s TTFT and 50 ms TPOT, "
            f"peak memory {one.peak_bytes / 1e6:,.0f} MB ({one.base_bytes / 1e6:,.0f} MB before the first request)"
        )
        if (work := one.router) is not None:
            count = one.num_requests
            print(
                f"router, for each request: {work.busy_s / count * 1e6:.0f} us of CPU time, "
                f"{work.num_inputs / count:.1f} inputs, {work.num_sent / count:.1f} messages sent, "
                f"{work.kv_bytes / count / 1e6:.0f} MB handed over"
            )
    if (index := costs.index) is not None:
        print(
            f"index of prefixes: {index.bytes_per_block:.0f} bytes a block, {index.blocks_per_instance:,} blocks an "
            f"instance; a prompt that nobody holds is looked up in {index.unknown_s * 1e6:.0f} us, one whose blocks "
            f"all hold in {index.held_by_all_s * 1e6:.0f} us"
        )


if __name__ == "__main__":
    main()
