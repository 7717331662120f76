"""Simulated instances of one host that lend each other their cores, against arithmetic and against steps one by one."""

import math
import random
from dataclasses import replace

import pytest
from simulated import LinearLatency, cluster_spec, instance, lending, pair, poisson, serve, stamps

from disagg.base.config import InstanceGroup, Placement
from disagg.base.ids import RequestId
from disagg.base.request import Role
from disagg.costs.contention import Activity, ServingCost
from disagg.costs.latency import StepShape
from disagg.costs.links import LinkModel
from disagg.costs.measured_steps import FittedInterference, StepSample
from disagg.costs.profile import ParallelSamples, Profile
from disagg.costs.profiled_platform import ProfiledPlatform
from disagg.simulator.cluster import ClusterSpec, SimulatedCluster
from disagg.simulator.engines import build_cluster, own_rules
from disagg.simulator.faults import Faults, InstanceDeath
from disagg.simulator.recording import Recording
from disagg.simulator.request import SimulatedRequest

INTERFERENCE = FittedInterference({Activity.DECODE: (0.0013, 0.0, 1.1e-7), Activity.PREFILL: (0.0004, 1.7e-6, 0.0)})
SERVING = ServingCost(step_s=0.0006, token_s=0.0001, num_cores=2, request_s=0.004, prompt_token_s=3e-6, spread_s=0.3)
TWO = cluster_spec(instance(Role.COLOCATED), instance(Role.COLOCATED, 1))


def request(name: str, arrival_s: float, prompt_len: int, output_len: int) -> SimulatedRequest:
    return SimulatedRequest(RequestId(name), arrival_s, prompt_len, output_len)


def prefill_s(num_tokens: int) -> float:
    shape = StepShape()
    shape.add_prefill(0, num_tokens)
    return LinearLatency().stage_times_s(shape)[0]


def by_name(requests: list[SimulatedRequest]) -> dict[str, SimulatedRequest]:
    return {str(one.request_id): one for one in requests}


def test_a_lone_prompt_is_computed_on_all_cores() -> None:
    (ended,) = serve(lending(pair()), [request("a", 1.0, 200, 1)])
    assert ended.timeline.first_token_s - 1.0 == pytest.approx(prefill_s(200) / 2)
    (ended,) = serve(pair(), [request("a", 1.0, 200, 1)])
    assert ended.timeline.first_token_s - 1.0 == pytest.approx(prefill_s(200))


def test_an_answer_is_written_on_all_cores_too() -> None:
    def tpot_s(spec: ClusterSpec) -> float:
        (ended,) = serve(spec, [request("a", 0.0, 100, 50)])
        return (ended.timeline.last_token_s - ended.timeline.first_token_s) / 49

    fast = pair(link=LinkModel(1e15, latency_s=0.0))
    assert tpot_s(lending(fast)) == pytest.approx(tpot_s(fast) / 2, rel=0.01)


def test_a_neighbour_that_begins_has_its_core_back_at_once() -> None:
    """The first prompt has both cores until the second comes, and again when that is done."""
    long_s, short_s = prefill_s(250), prefill_s(100)
    came_s = long_s / 8  # on both cores, that is a quarter of it
    ended = by_name(serve(lending(TWO), [request("long", 0.0, 250, 1), request("short", came_s, 100, 1)]))
    assert ended["short"].timeline.first_token_s == pytest.approx(came_s + short_s)
    left = 0.75 - short_s / long_s
    assert ended["long"].timeline.first_token_s == pytest.approx(came_s + short_s + left * long_s / 2)


def test_a_running_step_takes_a_core_that_comes_free() -> None:
    long_s, short_s = prefill_s(250), prefill_s(50)
    ended = by_name(serve(lending(TWO), [request("long", 0.0, 250, 1), request("short", 0.0, 50, 1)]))
    assert ended["short"].timeline.first_token_s == pytest.approx(short_s)
    assert ended["long"].timeline.first_token_s == pytest.approx(short_s + (long_s - short_s) / 2)


def test_cores_make_no_step_slower() -> None:
    requests = [request("a", 0.0, 100, 20)]
    slow = serve(lending(pair(), wider=1.2, step_s=0.01), requests)
    alone = serve(pair(), [request("a", 0.0, 100, 20)])
    assert slow[0].timeline.last_token_s == pytest.approx(alone[0].timeline.last_token_s)


def test_a_dead_instance_keeps_nobody_from_its_core() -> None:
    deaths = Faults(deaths=(InstanceDeath(time_s=0.0005, instance=TWO.instances[1].name),))
    spec = lending(replace(TWO, faults=deaths))
    long_s = prefill_s(250)
    ended = by_name(serve(spec, [request("long", 0.0, 250, 1), request("short", 0.0, 50, 1)]))
    assert ended["long"].timeline.first_token_s == pytest.approx(0.0005 + (long_s - 0.0005) / 2)


def test_a_lent_core_has_no_time_to_serve() -> None:
    """What serves is felt by a lone step once it computes on both cores."""
    shape = StepShape()
    shape.add_prefill(0, 200)
    (ended,) = serve(lending(pair(serving=SERVING)), [request("a", 1.0, 200, 1)])
    both_s = prefill_s(200) / 2 + SERVING.work_s(1)
    assert ended.timeline.first_token_s - 1.0 == pytest.approx(both_s)


def test_borrowed_time_is_told() -> None:
    cluster = SimulatedCluster(lending(pair()), lambda ended: None, Recording(step_by_step=True))
    cluster.run([request("a", 0.0, 200, 1)])
    load = cluster.instances[0].load()
    assert load.borrowed_core_seconds_total == pytest.approx(prefill_s(200) / 2)


DEPLOYMENTS = {
    "a pair": pair(link=LinkModel(2e8, latency_s=0.0007)),
    "with interference": pair(interference=INTERFERENCE, serving=SERVING),
    "three colocated": cluster_spec(*(instance(Role.COLOCATED, number) for number in range(3)), serving=SERVING),
    "unequal": cluster_spec(
        instance(Role.COLOCATED, 0, num_threads=2),
        *(instance(Role.COLOCATED, number) for number in (1, 2)),
        interference=INTERFERENCE,
    ),
}


@pytest.mark.parametrize("name", DEPLOYMENTS)
@pytest.mark.parametrize("seed", range(4))
def test_runs_of_decode_steps_are_timed_as_single_steps_are(name: str, seed: int) -> None:
    """A run stops where a neighbour's begin or end changes its pace, in the middle of a step."""
    spec, rate = lending(DEPLOYMENTS[name], wider=0.6), random.Random(seed).choice((2, 20, 60))
    quick = serve(spec, poisson(rate, 80, seed))
    slow = serve(spec, poisson(rate, 80, seed), step_by_step=True)
    assert stamps(quick) == stamps(slow)
    assert stamps(quick) != stamps(serve(DEPLOYMENTS[name], poisson(rate, 80, seed)))


@pytest.mark.parametrize("seed", range(4))
def test_work_that_waits_for_nothing_ends_between_its_times_on_own_and_on_all_cores(seed: int) -> None:
    """One request for each of two instances, so that queues do not decide."""
    lengths = random.Random(seed)
    requests = [request(str(n), lengths.random() / 50, lengths.randint(4, 250), 1) for n in range(2)]
    for one in serve(lending(TWO, wider=0.6), sorted(requests, key=lambda one: one.arrival_s)):
        lasted_s = one.timeline.first_token_s - one.arrival_s
        own_s = prefill_s(one.prompt_len)
        assert 0.6 * own_s * (1 - 1e-9) <= lasted_s <= own_s * (1 + 1e-9)


def test_lending_serves_no_request_later_on_a_quiet_host() -> None:
    requests = [request(str(n), float(n), 30 * (n + 1), 40) for n in range(8)]
    with_loans = by_name(serve(lending(pair()), [replace_arrival(one) for one in requests]))
    without = by_name(serve(pair(), requests))
    for name, ended in with_loans.items():
        assert ended.timeline.last_token_s < without[name].timeline.last_token_s
        assert math.isfinite(ended.timeline.last_token_s)


def profile_of(*threads: int) -> Profile:
    """A step takes 10 ms for each token on one thread, on more as much less."""
    steps = [
        ParallelSamples(
            tensor_parallel=1,
            num_threads=number,
            samples=tuple(StepSample(chunks=((0, 1),) * size, time_s=0.01 * size / number) for size in range(1, 20)),
        )
        for number in threads
    ]
    return Profile(
        model="m", device="d", dtype="bfloat16", kv_bytes_per_token=1000, steps=tuple(steps), link_bytes_per_s=1e9
    )


def cluster_on(num_cores: int | None, *threads: int) -> ClusterSpec:
    """Instances of these threads, on a host whose cores are lent."""
    groups = tuple(InstanceGroup(role=Role.COLOCATED, count=1, num_threads=number) for number in threads)
    platform = ProfiledPlatform(profile_of(1, 2, 4), 1 << 20)
    return build_cluster(Placement(groups=groups), platform, own_rules(), lent_cores=num_cores)


def test_an_instance_borrows_as_many_cores_as_it_has_and_its_step_times_come_from_the_profile() -> None:
    wide, *others = (one.cores for one in cluster_on(4, 2, 1, 1).instances)
    assert wide is not None
    assert (wide.own, wide.others, sorted(wide.latencies)) == ((0, 1), (2, 3), [1, 2])
    two_decodes = StepShape(num_decodes=2, decode_context=2, num_samples=2)
    assert wide.latencies[2].stage_times_s(two_decodes)[0] == pytest.approx(0.02 / 4, rel=0.02)
    assert [one.others for one in others if one is not None] == [(3,), (0,)]


@pytest.mark.parametrize(("num_cores", "threads"), [(None, (1, 1)), (1, (1, 1)), (2, (2,))])
def test_nobody_lends_who_was_not_told_to_or_shares_cores_or_is_alone(
    num_cores: int | None, threads: tuple[int, ...]
) -> None:
    assert [one.cores for one in cluster_on(num_cores, *threads).instances] == [None] * len(threads)


def replace_arrival(one: SimulatedRequest) -> SimulatedRequest:
    return request(str(one.request_id), one.arrival_s, one.prompt_len, one.output_len)
