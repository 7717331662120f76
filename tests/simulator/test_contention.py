"""Neighbours on one host: what they compute lengthens steps, by the same amount however the steps are timed."""

import random
from dataclasses import replace

import pytest
from simulated import LinearLatency, cluster_spec, instance, pair, poisson, serve, stamps

from disagg.base.ids import InstanceId
from disagg.base.request import Role
from disagg.simulator.contention import Activity, Host, ServingCost
from disagg.simulator.latency import StepShape
from disagg.simulator.measured_steps import FittedInterference

INTERFERENCE = FittedInterference({Activity.DECODE: (0.0013, 0.0, 1.1e-7), Activity.PREFILL: (0.0004, 1.7e-6, 0.0)})
SERVING = ServingCost(step_s=0.0006, token_s=0.0001, num_cores=2)
DECODE = StepShape(num_decodes=2, decode_context=300, num_samples=2)
A, B, C = InstanceId("a"), InstanceId("b"), InstanceId("c")


def test_a_step_takes_longer_by_what_its_neighbours_compute() -> None:
    host = Host(INTERFERENCE)
    for name in (A, B, C):
        host.join(name, lambda: None)
    alone = LinearLatency()
    (alone_s,) = alone.stage_times_s(DECODE)
    assert host.beside_neighbours(A, alone) is alone
    host.set_activity(B, Activity.DECODE)
    (beside_s,) = host.beside_neighbours(A, alone).stage_times_s(DECODE)
    assert beside_s == pytest.approx(alone_s + 0.0013 + 300 * 1.1e-7)
    assert host.beside_neighbours(B, alone) is alone
    host.set_activity(C, Activity.PREFILL)
    (both_s,) = host.beside_neighbours(A, alone).stage_times_s(DECODE)
    assert both_s == pytest.approx(beside_s + 0.0004 + 2 * 1.7e-6)


def test_neighbours_hear_of_changes_alone() -> None:
    host, heard = Host(INTERFERENCE), []
    for name in (A, B):
        host.join(name, lambda name=name: heard.append(name))  # type: ignore[misc]
    for activity in (Activity.DECODE, Activity.DECODE, Activity.PREFILL, None, None):
        host.set_activity(A, activity)
    assert heard == [B, B, B]


def test_a_pipeline_shares_out_what_is_added() -> None:
    host = Host(INTERFERENCE)
    host.join(A, lambda: None)
    host.set_activity(B, Activity.DECODE)
    halves = host.beside_neighbours(A, LinearLatency(num_stages=2))
    (whole_s,) = host.beside_neighbours(A, LinearLatency()).stage_times_s(DECODE)
    assert halves.num_stages == 2
    assert sum(halves.stage_times_s(DECODE)) == pytest.approx(whole_s)


def test_computing_instances_share_the_work_of_serving_where_no_core_is_left() -> None:
    host = Host(serving=SERVING)
    for name in (A, B):
        host.join(name, lambda: None)
    alone = LinearLatency()
    (alone_s,) = alone.stage_times_s(DECODE)
    assert host.beside_neighbours(A, alone) is alone  # the other core serves
    host.set_activity(B, Activity.DECODE, num_tokens=4, step_s=0.01)
    own_s = (0.0006 + 2 * 0.0001) / 2
    neighbours_part = (0.0006 + 4 * 0.0001) / 0.01 / 2
    (beside_s,) = host.beside_neighbours(A, alone).stage_times_s(DECODE)
    assert beside_s == pytest.approx((alone_s + own_s) / (1 - neighbours_part))
    # A step without a token, such as a prompt's first chunk, makes no work.
    silent = StepShape(num_prefills=1, num_prefill_tokens=64, prefill_squares=64**2)
    host.set_activity(B, Activity.PREFILL, num_tokens=0, step_s=0.01)
    assert host.beside_neighbours(A, alone).stage_times_s(silent) == alone.stage_times_s(silent)


def test_serving_costs_nothing_on_a_core_of_its_own() -> None:
    requests = stamps(serve(pair(), poisson(40, 60, 1)))
    spare = replace(SERVING, num_cores=3)
    assert stamps(serve(pair(serving=spare), poisson(40, 60, 1))) == requests
    assert stamps(serve(pair(serving=replace(spare, cores_per_instance=2)), poisson(40, 60, 1))) != requests
    assert stamps(serve(pair(serving=SERVING), poisson(40, 60, 1))) != requests


@pytest.mark.parametrize("seed", range(6))
def test_runs_of_decode_steps_are_timed_as_single_steps_are(seed: int) -> None:
    """A neighbour that begins or ends in the middle of a run changes it from the next step on."""
    rate = random.Random(seed).choice((5, 20, 60))
    for spec in (
        pair(interference=INTERFERENCE),
        cluster_spec(*(instance(Role.COLOCATED, number) for number in range(3)), interference=INTERFERENCE),
        pair(interference=INTERFERENCE, serving=SERVING),
        cluster_spec(*(instance(Role.COLOCATED, number) for number in range(3)), serving=replace(SERVING, num_cores=3)),
    ):
        quick = serve(spec, poisson(rate, 80, seed))
        slow = serve(spec, poisson(rate, 80, seed), step_by_step=True)
        assert stamps(quick) == stamps(slow)


def test_what_is_not_measured_costs_nothing() -> None:
    nothing = FittedInterference({})
    assert nothing.added_s(Activity.DECODE, DECODE) == 0
    requests = stamps(serve(pair(), poisson(20, 60, 1)))
    assert stamps(serve(pair(interference=nothing), poisson(20, 60, 1))) == requests
    assert stamps(serve(pair(interference=INTERFERENCE), poisson(20, 60, 1))) != requests
