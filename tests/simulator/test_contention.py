"""Neighbours on one host: what they compute lengthens steps, by the same amount however the steps are timed."""

import random
from dataclasses import replace

import pytest
from simulated import LinearLatency, cluster_spec, instance, pair, poisson, serve, stamps

from disagg.base.ids import InstanceId
from disagg.base.request import Role
from disagg.costs.contention import Activity, ServingCost
from disagg.costs.latency import StepShape
from disagg.costs.measured_steps import FittedInterference
from disagg.simulator.event_queue import EventQueue
from disagg.simulator.host import SimulatedHost

INTERFERENCE = FittedInterference({Activity.DECODE: (0.0013, 0.0, 1.1e-7), Activity.PREFILL: (0.0004, 1.7e-6, 0.0)})
SPREAD_S = 0.3
"""How long what serves stays on a core that was idle."""
SERVING = ServingCost(
    step_s=0.0006, token_s=0.0001, num_cores=2, request_s=0.004, prompt_token_s=3e-6, spread_s=SPREAD_S
)
DECODE = StepShape(num_decodes=2, decode_context=300, num_samples=2)
A, B, C = InstanceId("a"), InstanceId("b"), InstanceId("c")


def test_a_step_takes_longer_by_what_its_neighbours_compute() -> None:
    host = SimulatedHost(EventQueue(), INTERFERENCE)
    for name in (A, B, C):
        host.join(name, lambda: None)
    alone = LinearLatency()
    (alone_s,) = alone.stage_times_s(DECODE)
    assert host.latency_now(A, alone) is alone
    host.set_activity(B, Activity.DECODE)
    (beside_s,) = host.latency_now(A, alone).stage_times_s(DECODE)
    assert beside_s == pytest.approx(alone_s + 0.0013 + 300 * 1.1e-7)
    assert host.latency_now(B, alone) is alone
    host.set_activity(C, Activity.PREFILL)
    (both_s,) = host.latency_now(A, alone).stage_times_s(DECODE)
    assert both_s == pytest.approx(beside_s + 0.0004 + 2 * 1.7e-6)


def test_neighbours_hear_of_changes_alone() -> None:
    host, heard = SimulatedHost(EventQueue(), INTERFERENCE), []
    for name in (A, B):
        host.join(name, lambda name=name: heard.append(name))  # type: ignore[misc]
    for activity in (Activity.DECODE, Activity.DECODE, Activity.PREFILL, None, None):
        host.set_activity(A, activity)
    assert heard == [B, B, B]


def test_a_pipeline_shares_out_what_is_added() -> None:
    host = SimulatedHost(EventQueue(), INTERFERENCE)
    host.join(A, lambda: None)
    host.set_activity(B, Activity.DECODE)
    halves = host.latency_now(A, LinearLatency(num_stages=2))
    (whole_s,) = host.latency_now(A, LinearLatency()).stage_times_s(DECODE)
    assert halves.num_stages == 2
    assert sum(halves.stage_times_s(DECODE)) == pytest.approx(whole_s)


class TestServing:
    """Two instances on two cores: A and B, and what serves on either."""

    def setup_method(self) -> None:
        self.queue = EventQueue()
        self.host = SimulatedHost(self.queue, serving=SERVING)
        self.heard: list[InstanceId] = []
        for name in (A, B):
            self.host.join(name, lambda name=name: self.heard.append(name))  # type: ignore[misc]
        (self.alone_s,) = LinearLatency().stage_times_s(DECODE)

    def compute(self, name: InstanceId, num_tokens: int) -> None:
        self.host.set_activity(name, Activity.DECODE, num_tokens, step_s=0.01)

    def wait(self, duration_s: float) -> None:
        """Let time pass."""
        end_s = self.queue.now() + duration_s
        self.queue.push(end_s, lambda: None)
        self.queue.run(until_s=end_s)

    def step_s(self, name: InstanceId, shape: StepShape = DECODE) -> float:
        (time_s,) = self.host.latency_now(name, LinearLatency()).stage_times_s(shape)
        return time_s

    def test_a_free_core_serves_unnoticed(self) -> None:
        self.host.arrive(1000)
        assert self.step_s(A) == self.alone_s

    def test_computing_instances_share_the_work(self) -> None:
        self.compute(A, 2)
        self.compute(B, 4)
        self.wait(SPREAD_S)
        own_s, neighbours = (0.0006 + 2 * 0.0001) / 2, (0.0006 + 4 * 0.0001) / 0.01 / 2
        assert self.step_s(A) == pytest.approx((self.alone_s + own_s) / (1 - neighbours))

    def test_a_step_without_a_token_makes_no_work(self) -> None:
        self.compute(A, 2)
        self.compute(B, 0)
        self.wait(SPREAD_S)
        silent = StepShape(num_prefills=1, num_prefill_tokens=64, prefill_squares=64**2)
        assert self.step_s(A, silent) == LinearLatency().stage_times_s(silent)[0]

    def test_who_begins_on_an_idle_core_pays_all_until_the_work_is_spread(self) -> None:
        self.compute(A, 2)
        self.wait(1.0)
        neighbours = (0.0006 + 2 * 0.0001) / 0.01
        expected_s = (self.alone_s + 0.0006 + 2 * 0.0001) / (1 - neighbours)
        assert self.step_s(B) == pytest.approx(expected_s)
        self.compute(B, 2)
        assert self.step_s(B) == pytest.approx(expected_s)
        assert self.step_s(A) == self.alone_s
        self.heard.clear()
        self.wait(SPREAD_S)
        assert self.heard == [A, B]
        assert self.step_s(A) == self.step_s(B) < expected_s

    def test_the_next_step_pays_for_a_request_that_arrived(self) -> None:
        self.compute(A, 2)
        self.compute(B, 2)
        self.wait(SPREAD_S)
        usual_s = self.step_s(A)
        self.heard.clear()
        self.host.arrive(1000)
        assert self.heard == [A, B]
        served = (0.0006 + 2 * 0.0001) / 0.01 / 2
        assert self.step_s(A) == pytest.approx(usual_s + (0.004 + 1000 * 3e-6) / 2 / (1 - served))
        assert self.step_s(A) == usual_s

    def test_what_is_owed_is_forgotten_when_a_core_is_free_to_do_it(self) -> None:
        self.compute(A, 2)
        self.compute(B, 2)
        self.wait(SPREAD_S)
        usual_s = self.step_s(A)
        self.host.arrive(1000)
        self.host.set_activity(B, None)
        assert self.step_s(A) == self.alone_s
        self.compute(B, 2)
        self.wait(SPREAD_S)
        assert self.step_s(A) == self.step_s(B) == usual_s


def test_serving_costs_nothing_on_a_core_of_its_own() -> None:
    requests = stamps(serve(pair(), poisson(40, 60, 1)))
    spare = replace(SERVING, num_cores=3)
    assert stamps(serve(pair(serving=spare), poisson(40, 60, 1))) == requests
    wide = pair(serving=spare)
    wide = replace(wide, instances=tuple(replace(one, num_threads=2) for one in wide.instances))
    assert stamps(serve(wide, poisson(40, 60, 1))) != requests
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
