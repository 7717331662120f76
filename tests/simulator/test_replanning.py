"""Re-planning in virtual time: a workload that turns and turns back, and one that stays."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from msgspec import structs
from simulated import cluster_spec, instance, poisson

from disagg.base.config import RouterSettings
from disagg.base.elastic_settings import Replan
from disagg.base.ids import RequestId
from disagg.base.objectives import Objectives
from disagg.base.request import Role
from disagg.placement.replanning import answer_question
from disagg.scheduling.replan.placements import RoleCounts
from disagg.scheduling.replan.question import ForecastPlacement, PlanAnswer, PlanQuestion
from disagg.scheduling.router.outputs import PlanDecided
from disagg.simulator.cluster import SimulatedCluster
from disagg.simulator.request import Outcome, SimulatedRequest

Planner = Callable[[PlanQuestion], PlanAnswer]

OBJECTIVES = Objectives(ttft_s=0.3, tpot_s=0.0035)
WRITING = (40.0, (50, 200), (20, 60))
"""Rate, prompt and answer lengths of a load for decode instances."""
READING = (36.0, (2000, 4500), (2, 4))
"""Of one for prefill instances: more than one of them can do."""


def load(*phases: tuple[tuple[float, tuple[int, int], tuple[int, int]], int]) -> list[SimulatedRequest]:
    """So many requests of each phase."""
    found: list[SimulatedRequest] = []
    for number, ((rate, prompt, output), count) in enumerate(phases):
        start_s = found[-1].arrival_s if found else 0.0
        for one in poisson(rate, count, number, prompt, output):
            name = RequestId(f"{number}.{one.request_id}")
            found.append(SimulatedRequest(name, start_s + one.arrival_s, one.prompt_len, one.output_len))
    return found


def plan_quickly(question: PlanQuestion) -> PlanAnswer:
    return answer_question(structs.replace(question, horizon_s=4.0))


def promising(gain: float, num_gained: int) -> Planner:
    """A planner that sees so much gain in two prefill instances."""

    def answer(question: PlanQuestion) -> PlanAnswer:
        planned = [
            ForecastPlacement(counts=counts, attainment=0.5 + gain, num_gained=num_gained)
            if counts == RoleCounts(2, 1)
            else ForecastPlacement(counts=counts, attainment=0.5)
            for counts in question.placements
        ]
        return PlanAnswer(placements=tuple(planned), num_requests=200)

    return answer


def serve(replan: Replan, requests: Sequence[SimulatedRequest], planner: Planner = plan_quickly) -> list[PlanDecided]:
    """Serve with one prefill and two decode instances at the start; return what was decided."""
    settings = {"objectives": OBJECTIVES, "tells_costs": True, "num_blocks": 4096}
    spec = cluster_spec(
        instance(Role.PREFILL, **settings),
        instance(Role.DECODE, 0, **settings),
        instance(Role.DECODE, 1, **settings),
        router=RouterSettings(max_queued_requests=10**6, request_timeout_s=1e6, replan=replan),
    )
    ended: list[SimulatedRequest] = []
    cluster = SimulatedCluster(replace(spec, planner=planner, plan_s=1.0), ended.append)
    cluster.run(requests)
    assert {one.outcome for one in ended} == {Outcome.FINISHED}
    assert len(ended) == len(requests)
    return [decided for _, decided in cluster.decisions if isinstance(decided, PlanDecided)]


def mean_ttft(requests: Sequence[SimulatedRequest]) -> float:
    return sum(one.ttft_s for one in requests) / len(requests)


@pytest.mark.parametrize(
    ("replan", "planner", "pays", "acts"),
    [
        (Replan.ACT, promising(0.2, 40), True, True),
        (Replan.ADVISE, promising(0.2, 40), True, False),
        (Replan.ACT, promising(0.01, 40), False, False),
        (Replan.ACT, promising(0.04, 4), False, False),
    ],
    ids=["acts", "advises", "too little gain", "gain by chance"],
)
def test_what_is_made_of_an_answer(replan: Replan, planner: Planner, pays: bool, acts: bool):
    decided = serve(replan, load((WRITING, 200)), planner)
    assert (decided[0].pays, decided[0].acts) == (pays, acts)
    assert decided[0].why == "the first requests"
    assert decided[0].present == RoleCounts(1, 2)


@pytest.mark.slow
def test_a_plan_is_made_for_each_workload_and_for_no_mixture():
    asked: list[PlanQuestion] = []

    def staying(question: PlanQuestion) -> PlanAnswer:
        asked.append(question)
        return promising(0.0, 0)(question)

    assert not any(one.pays for one in serve(Replan.ACT, load((WRITING, 300), (READING, 300)), staying))
    assert len(asked) >= 2
    first, last = (sum(one.num_prompt_tokens for one in question.requests) for question in (asked[0], asked[-1]))
    assert last > 10 * first, "each plan is for the workload of its time"


def test_a_plan_that_failed_is_made_again_once():
    def hopeful(question: PlanQuestion) -> PlanAnswer:
        placements = tuple(ForecastPlacement(counts=counts, attainment=1.0) for counts in question.placements)
        return PlanAnswer(placements=placements, num_requests=200)

    decided = serve(Replan.ACT, load((READING, 900)), hopeful)
    failed = [one.why for one in decided if one.why.startswith("attainment")]
    assert len(failed) == 1
    assert "100.0% predicted" in failed[0]


def test_answers_that_are_longer_than_was_supposed_are_planned_for_again():
    asked: list[PlanQuestion] = []

    def staying(question: PlanQuestion) -> PlanAnswer:
        asked.append(question)
        return promising(0.0, 0)(question)

    short_and_long = load((WRITING, 400))
    for number, request in enumerate(short_and_long):
        request.output_len = 4 if number % 2 else 1000 + number
    decided = serve(Replan.ACT, short_and_long, staying)
    assert [one.why.split(":")[0] for one in decided[:2]] == [
        "the first requests",
        "what was supposed of the answer tokens",
    ]
    supposed, known = (sum(one.num_answer_tokens for one in question.requests) for question in asked[:2])
    assert known > 1.5 * supposed, "the same requests, with the answers that came"
    assert [one.arrival_s for one in asked[0].requests] == [one.arrival_s for one in asked[1].requests]


def test_a_workload_that_turns_is_followed():
    phases = ((WRITING, 150), (READING, 450))
    left, acted = load(*phases), load(*phases)
    serve(Replan.OFF, left)
    changes = [one for one in serve(Replan.ACT, acted) if one.acts]
    assert changes[0].best.prefill + changes[0].best.colocated > changes[0].present.prefill
    assert "prompt tokens to compute" in changes[0].why
    assert mean_ttft(acted[-100:]) < 0.75 * mean_ttft(left[-100:])


@pytest.mark.slow
@pytest.mark.parametrize("phase", [WRITING, READING], ids=["writing", "reading"])
def test_a_stationary_workload_is_planned_for_once_and_then_left(phase):
    decided = serve(Replan.ACT, load((phase, 700)))
    assert len(decided) <= 2
    assert sum(one.acts for one in decided) <= 1
