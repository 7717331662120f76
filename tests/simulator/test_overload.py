"""Ten times as many requests as can be served: who is admitted keeps the objectives, nobody feels another's flood."""

from collections.abc import Sequence

import pytest
from simulated import cluster_spec, lending, serve, slack_instances

from disagg.base.config import RouterSettings
from disagg.base.ids import RequestId
from disagg.base.objectives import Objectives
from disagg.base.request import Role
from disagg.base.service_classes import Overload
from disagg.costs.latency import LatencyModel, StepShape
from disagg.measure.standard import standard_workload
from disagg.simulator.cluster import ClusterSpec
from disagg.simulator.request import Outcome, SimulatedRequest

TTFT_S, TPOT_S = 4.4, 0.027
PAIR = (Role.PREFILL, Role.DECODE)
ROUTER = RouterSettings(max_queued_requests=10**6, request_timeout_s=1e6, strict_roles=False, overload=Overload.SHED)


class SmallModelOnOneCore:
    """A prompt token takes 1.1 ms, an answer of 500 tokens of context another 2 ms of each step."""

    num_stages = 1

    def stage_times_s(self, shape: StepShape) -> tuple[float, ...]:
        prefill_s = 1.1e-3 * shape.num_prefill_tokens + 2e-7 * shape.prefill_squares + 1e-3 * shape.num_prefills
        return (0.006 + prefill_s + 1.2e-3 * shape.num_decodes + 1.5e-6 * shape.decode_context,)


class SmallModelOnSlowCore:
    """A prompt token takes 4.8 ms: the smallest chunk, beside an answer, nearly twice the objective of 45 ms."""

    num_stages = 1

    def stage_times_s(self, shape: StepShape) -> tuple[float, ...]:
        prefill_s = 4.8e-3 * shape.num_prefill_tokens + 4e-7 * shape.prefill_squares + 2e-3 * shape.num_prefills
        return (0.008 + prefill_s + 4.5e-3 * shape.num_decodes + 3e-6 * shape.decode_context,)


ON_ONE_CORE = (SmallModelOnOneCore(), Objectives(ttft_s=TTFT_S, tpot_s=TPOT_S))
ON_SLOW_CORE = (SmallModelOnSlowCore(), Objectives(ttft_s=8.0, tpot_s=0.045))


def server(roles: Sequence[Role], machine: tuple[LatencyModel, Objectives] = ON_ONE_CORE) -> ClusterSpec:
    latency, objectives = machine
    instances = slack_instances(roles, latency, objectives, max_batch_size=64)
    return lending(cluster_spec(*instances, router=ROUTER), 0.55)


def chats(tenant: str, rate: float, first_s: float, seconds: float, seed: int) -> list[SimulatedRequest]:
    drawn = standard_workload("chat", rate, round(rate * seconds)).draw(seed)
    return [
        SimulatedRequest(
            RequestId(f"{tenant}-{number}"), first_s + one.arrival_s, one.prompt_len, one.output_len, tenant=tenant
        )
        for number, one in enumerate(drawn)
    ]


def served(
    roles: Sequence[Role],
    *loads: list[SimulatedRequest],
    machine: tuple[LatencyModel, Objectives] = ON_ONE_CORE,
) -> dict[str, list[SimulatedRequest]]:
    """Serve the loads on instances that have learned what their steps cost; return what ended of each tenant."""
    requests = [*chats("first", 1, 0.0, 8, seed=51), *(one for load in loads for one in load)]
    ended = serve(server(roles, machine), sorted(requests, key=lambda one: one.arrival_s))
    assert not any(one.outcome is Outcome.FAILED for one in ended)
    return {tenant: [one for one in ended if one.tenant == tenant] for tenant in {one.tenant for one in ended}}


def keeps(one: SimulatedRequest) -> bool:
    return one.outcome is Outcome.FINISHED and one.ttft_s <= TTFT_S and not one.tpot_s > TPOT_S


def part_kept(requests: Sequence[SimulatedRequest], *, of_answered: bool) -> float:
    counted = [one for one in requests if not of_answered or one.outcome is Outcome.FINISHED]
    return sum(map(keeps, counted)) / len(counted)


@pytest.mark.parametrize("roles", [PAIR, (Role.COLOCATED, Role.COLOCATED)])
def test_who_is_admitted_keeps_the_objectives(roles: Sequence[Role]) -> None:
    load = served(roles, chats("all", 10, 15.0, 60, seed=1))["all"]
    answered = [one for one in load if one.outcome is Outcome.FINISHED]
    assert part_kept(load, of_answered=True) >= 0.95
    assert len(answered) > 130, "far more could be served"
    assert max(one.ttft_s for one in answered) < 2 * TTFT_S


def test_on_a_slow_machine_nobody_waits_for_a_chunk_that_hardly_fits_or_a_guest_that_does_not_come() -> None:
    ttft_s, tpot_s = 8.0, 0.045
    loads = [served(PAIR, chats("all", 6, 15.0, 60, seed=seed), machine=ON_SLOW_CORE)["all"] for seed in (1, 2, 3)]
    answered = [one for load in loads for one in load if one.outcome is Outcome.FINISHED]
    assert sum(one.ttft_s <= ttft_s and not one.tpot_s > tpot_s for one in answered) >= 0.98 * len(answered)
    assert len(answered) > 110, "far more could be served"
    assert max(one.ttft_s for one in answered) < 1.25 * ttft_s


def test_a_flood_leaves_another_user_what_he_had() -> None:
    def quiet() -> list[SimulatedRequest]:
        return chats("quiet", 1 / 3, 15.0, 90, seed=1)

    alone = served(PAIR, quiet())["quiet"]
    both = served(PAIR, quiet(), chats("flood", 10, 15.0, 90, seed=10))
    assert part_kept(alone, of_answered=False) >= 0.95
    assert part_kept(both["quiet"], of_answered=False) >= part_kept(alone, of_answered=False) - 0.1
    assert part_kept(both["flood"], of_answered=True) >= 0.9
    assert sum(map(keeps, both["flood"])) > 150, "the flood is served with what is left"
