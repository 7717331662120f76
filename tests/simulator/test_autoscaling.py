"""Autoscaling in virtual time: a load that rises and falls, and one that stays."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from simulated import cluster_spec, instance, poisson, serve

from disagg.base.config import RouterSettings
from disagg.base.ids import RequestId
from disagg.base.objectives import Objectives
from disagg.base.request import Role
from disagg.scheduling.event_log import parse_log, replay
from disagg.scheduling.router.outputs import ScalingDecided
from disagg.simulator.cluster import ClusterSpec
from disagg.simulator.event_log import EventLogFolder
from disagg.simulator.request import Outcome, SimulatedRequest

OBJECTIVES = Objectives(ttft_s=0.2, tpot_s=0.006)
LITTLE, MUCH = 2.0, 32.0
RISE_S, FALL_S, END_S = 40.0, 90.0, 350.0


def spec(autoscale: str | None) -> ClusterSpec:
    """One prefill and one decode instance, with spares of both roles."""
    settings = {"objectives": OBJECTIVES, "tells_costs": True}
    spares = [(role, number) for role in (Role.PREFILL, Role.DECODE) for number in range(1, 7)]
    return cluster_spec(
        instance(Role.PREFILL, num_blocks=4096, **settings),
        instance(Role.DECODE, num_blocks=4096, **settings),
        spares=tuple(instance(role, number, num_blocks=4096, **settings) for role, number in spares),
        router=RouterSettings(max_queued_requests=10**6, request_timeout_s=1e6, autoscale=autoscale),
        start_spare_s=2.0,
    )


def ramp(*phases: tuple[float, float]) -> list[SimulatedRequest]:
    """Requests at a rate until a time, then at the next."""
    requests: list[SimulatedRequest] = []
    for number, (rate, until_s) in enumerate(phases):
        start_s = requests[-1].arrival_s if requests else 0.0
        drawn = poisson(rate, round(rate * (until_s - start_s)), seed=number, prompt=(1000, 4000), output=(5, 20))
        requests += [
            SimulatedRequest(
                RequestId(f"{number}.{one.request_id}"), start_s + one.arrival_s, one.prompt_len, one.output_len
            )
            for one in drawn
        ]
    return requests


def attainment(requests: Sequence[SimulatedRequest]) -> float:
    kept = [r for r in requests if r.ttft_s <= OBJECTIVES.ttft_s and not r.tpot_s > OBJECTIVES.tpot_s]
    return len(kept) / len(requests)


def decisions(folder: Path) -> list[tuple[float, ScalingDecided]]:
    log = parse_log((folder / "router.jsonl").read_bytes().splitlines(keepends=True))
    assert replay(log) is None, "the log replays to the same decisions"
    return [
        (record.now, output)
        for record in log.records
        for output in record.outputs
        if isinstance(output, ScalingDecided)
    ]


def test_a_load_that_rises_and_falls_is_followed_and_nothing_is_lost(tmp_path: Path) -> None:
    alone, scaled = (ramp((LITTLE, RISE_S), (MUCH, FALL_S), (LITTLE, END_S)) for _ in range(2))
    serve(spec(None), alone)
    with EventLogFolder(tmp_path) as log:
        serve(spec("prefill=1..6,decode=1..6"), scaled, log=log)
    assert {one.outcome for one in scaled} == {Outcome.FINISHED}
    decided = decisions(tmp_path)
    prefill = [(time_s, one.count, one.wanted) for time_s, one in decided if one.role is Role.PREFILL]
    time_s, count, wanted = prefill[0]
    assert count == 1 < wanted
    assert RISE_S < time_s < RISE_S + 15
    assert prefill[-1][2] == 1, "back to one when little comes"
    ups = [one for one in prefill if one[2] > one[1]]
    assert all(time_s < FALL_S for time_s, _, _ in ups)
    much = [one for one in scaled if RISE_S + 30 < one.arrival_s < FALL_S]
    assert attainment(much) > 0.9
    assert attainment(scaled) > attainment(alone) + 0.3


@pytest.mark.slow
def test_a_stationary_load_gets_what_it_needs_and_then_stays(tmp_path: Path) -> None:
    requests = ramp((MUCH, 70.0))
    with EventLogFolder(tmp_path) as log:
        serve(spec("prefill=1..6,decode=1..6"), requests, log=log)
    changes = [(time_s, one.wanted - one.count) for time_s, one in decisions(tmp_path) if time_s < 70.0]
    assert changes, "one prefill instance is too few"
    assert all(change > 0 for _, change in changes)
    assert all(time_s < 40.0 for time_s, _ in changes)
