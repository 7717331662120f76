"""Whatever dies, is cancelled or fails: every request ends once, no block is lost, and the same again is the same."""

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulated import cluster_spec, instance, poisson, serve, stamps

from disagg.base.config import RouterSettings
from disagg.base.ids import InstanceId
from disagg.base.request import Role
from disagg.costs.links import LinkModel
from disagg.scheduling.dispatch.events import ChangeRole, Drain, Join, Undrain
from disagg.scheduling.router.inputs import AnyCommand
from disagg.simulator.cluster import ClusterSpec
from disagg.simulator.faults import Faults, InstanceDeath, TimedCommand
from disagg.simulator.request import FIRST_EPOCH, Outcome, SimulatedRequest

SLOW = LinkModel(bytes_per_s=2e7, latency_s=0.001)
SPARE = instance(Role.COLOCATED, 9)
DEPLOYMENTS = {
    "1x1": cluster_spec(instance(Role.PREFILL), instance(Role.DECODE, num_blocks=90), link=SLOW),
    "2x2": cluster_spec(
        *(instance(role, number, num_blocks=120) for role in (Role.PREFILL, Role.DECODE) for number in (0, 1)),
        link=SLOW,
        message_s=0.0003,
    ),
    "mixed": cluster_spec(
        instance(Role.PREFILL), instance(Role.DECODE), instance(Role.COLOCATED, max_steps_in_flight=2), link=SLOW
    ),
}


@st.composite
def faulty(draw: st.DrawFn) -> tuple[ClusterSpec, int]:
    """A deployment with deaths, commands and failing pulls, and the seed of what is asked of it."""
    spec = DEPLOYMENTS[draw(st.sampled_from(sorted(DEPLOYMENTS)))]
    names = st.sampled_from([one.name for one in spec.instances])
    deaths = st.builds(
        InstanceDeath,
        time_s=st.floats(0.01, 1.5),
        instance=names,
        start_s=st.floats(0.01, 0.5),
    )
    chosen = draw(st.lists(deaths, max_size=3, unique_by=lambda death: death.instance))
    commands = draw(st.lists(st.builds(TimedCommand, st.floats(0.01, 1.5), wishes(names), st.just(0.1)), max_size=6))
    seed = draw(st.integers(0, 10**6))
    failing = frozenset(request.request_id for request in asked(seed)[:: draw(st.integers(2, 9))])
    faults = Faults(tuple(chosen), tuple(sorted(commands, key=lambda one: one.time_s)), failing)
    return replace(spec, faults=faults, spares=(SPARE,)), seed


def wishes(names: st.SearchStrategy[InstanceId]) -> st.SearchStrategy[AnyCommand]:
    """What an operator may want; what cannot be done is refused."""
    return st.one_of(
        st.just(Join(instance=SPARE.name, role=SPARE.role)),
        st.builds(Drain, instance=names, leave=st.booleans()),
        st.builds(Undrain, instance=names),
        st.builds(ChangeRole, instance=names, role=st.sampled_from(Role)),
    )


def asked(seed: int) -> list[SimulatedRequest]:
    requests = poisson(rate=50, count=40, seed=seed, output=(1, 60))
    for request in requests[seed % 5 :: 5]:
        request.cancel_s = request.arrival_s + 0.001 * (seed % 97)
    return requests


@given(case=faulty())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_request_ends_once_and_every_block_comes_back(case: tuple[ClusterSpec, int]) -> None:
    spec, seed = case
    requests = asked(seed)
    ended = serve(spec, requests)  # raises unless all blocks of the living are free or cached at the end
    assert sorted(request.request_id for request in ended) == sorted(request.request_id for request in requests)
    for request in ended:
        assert request.outcome in (Outcome.FINISHED, Outcome.CANCELLED, Outcome.FAILED)
        if request.outcome is Outcome.FINISHED:
            assert request.num_output_tokens == request.output_len
        stages = request.timeline.stages()
        assert sum(stages.values()) == pytest.approx(request.timeline.finished_s - request.arrival_s)
    assert stamps(serve(spec, asked(seed))) == stamps(requests)


def test_what_a_dead_instance_held_goes_on_elsewhere_and_nothing_fails() -> None:
    death = InstanceDeath(0.5, InstanceId("decode-1"), start_s=0.2)
    requests = poisson(rate=50, count=60, seed=3)
    serve(replace(DEPLOYMENTS["2x2"], faults=Faults((death,))), requests)
    assert {request.outcome for request in requests} == {Outcome.FINISHED}
    assert [request.num_output_tokens for request in requests] == [request.output_len for request in requests]
    assert any(request.epoch > FIRST_EPOCH for request in requests)


def at_random(seed: int, num_faults: int, until_s: float) -> Faults:
    """Deaths and commands drawn from a seed."""
    rng = random.Random(seed)
    spec = DEPLOYMENTS["2x2"]
    names = [one.name for one in spec.instances]
    deaths, commands = [], [TimedCommand(rng.uniform(0, until_s), Join(instance=SPARE.name, role=SPARE.role), 0.1)]
    for _ in range(num_faults):
        time_s, name = rng.uniform(0, until_s), rng.choice(names)
        match rng.randrange(4):
            case 0 if sum(death.instance == name for death in deaths) < 4:  # one more, and it could be given up
                deaths.append(InstanceDeath(time_s, name, start_s=rng.uniform(0.01, 0.5)))
            case 1:
                commands.append(TimedCommand(time_s, Drain(instance=name)))
            case 2:
                commands.append(TimedCommand(time_s, Undrain(instance=name)))
            case _:
                commands.append(TimedCommand(time_s, ChangeRole(instance=name, role=rng.choice(list(Role)))))
    return Faults(tuple(deaths), tuple(sorted(commands, key=lambda one: one.time_s)))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(50))
def test_two_thousand_requests_of_a_hundred_thousand(seed: int) -> None:
    """None is lost or refused, whatever dies, drains and flips: a seed that fails can be run alone."""
    requests = poisson(rate=50, count=2000, seed=seed, output=(1, 60))
    router = RouterSettings(
        max_queued_requests=10**6, request_timeout_s=1e6, instance_wait_s=1e6, max_instance_losses=10**6
    )
    spec = replace(DEPLOYMENTS["2x2"], spares=(SPARE,), faults=at_random(seed, 60, 40.0), router=router)
    ended = serve(spec, requests)
    assert len(ended) == len(requests)
    assert Counter((request.outcome, request.detail) for request in requests) == {(Outcome.FINISHED, ""): 2000}
    assert all(request.num_output_tokens == request.output_len for request in requests)
