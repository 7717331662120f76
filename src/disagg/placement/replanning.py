"""Answers a router whose workload has moved: simulates each placement that it can reach, the way there included.

The requests of the question are repeated, with their gaps, until ``horizon_s`` after the change; what came before them
runs on the present placement, so that the change meets queues and running answers. Prefix hits are prompt tokens that
need not be computed. Instances do not disturb each other here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Final

from msgspec import structs

from disagg.base.elastic_settings import Replan
from disagg.base.ids import InstanceId, RequestId
from disagg.base.messages import StepCosts
from disagg.base.request import Role
from disagg.costs.latency import StepShape
from disagg.costs.links import LinkModel
from disagg.costs.step_costs import step_time_s
from disagg.costs.topology import Topology
from disagg.scheduling.dispatch.events import Join
from disagg.scheduling.replan.placements import RoleCounts, changes_towards
from disagg.scheduling.replan.question import ForecastPlacement, PlanAnswer, PlanQuestion
from disagg.simulator.cluster import ClusterSpec, SimulatedCluster
from disagg.simulator.faults import Faults, TimedCommand
from disagg.simulator.instance_spec import InstanceSpec
from disagg.simulator.request import Outcome, SimulatedRequest

WARM_UP: Final = 0.2
"""Part of a simulation that runs on the present placement, before the change."""
MOST_REQUESTS: Final = 800
"""Of a simulation; at higher rates the horizon is shorter."""
_BLOCK_SIZE: Final = 16
_KV_BYTES: Final = 1000
"""Of a token: what a link carries is told in tokens."""
_PATIENT_S: Final = 1e6


@dataclass(frozen=True)
class LearnedLatency:
    """Step times by what instances have learned: of steps with prefill, and of decodes alone."""

    prefill: StepCosts
    decode: StepCosts
    num_stages: int = 1

    def stage_times_s(self, shape: StepShape) -> tuple[float, ...]:
        """See LatencyModel."""
        return (max(1e-6, step_time_s(self.prefill if shape.num_prefills else self.decode, shape)),)


def answer_question(question: PlanQuestion) -> PlanAnswer:
    """Simulate all placements of a question."""
    staying = _kept(question, question.placements[0])
    planned = []
    for counts in question.placements:
        kept = staying if counts == question.placements[0] else _kept(question, counts)
        planned.append(
            ForecastPlacement(
                counts=counts,
                attainment=sum(kept.values()) / max(1, len(kept)),
                num_gained=sum(one and not staying[name] for name, one in kept.items()),
                num_lost=sum(not one and staying[name] for name, one in kept.items()),
            )
        )
    return PlanAnswer(placements=tuple(planned), num_requests=len(staying))


def _kept(question: PlanQuestion, counts: RoleCounts) -> dict[RequestId, bool]:
    """Return which of the requests after the change keep their objectives."""
    objectives = question.scheduler.objectives
    kept: dict[RequestId, bool] = {}

    begin_s = WARM_UP * _span_s(question)

    def end(request: SimulatedRequest) -> None:
        if request.arrival_s >= begin_s:
            in_time = objectives.ttft_s is None or request.ttft_s <= objectives.ttft_s
            is_fast = objectives.tpot_s is None or not request.tpot_s > objectives.tpot_s
            kept[request.request_id] = request.outcome is Outcome.FINISHED and in_time and is_fast

    SimulatedCluster(_cluster(question, counts), end).run(_requests(question))
    return kept


def _requests(question: PlanQuestion) -> Iterator[SimulatedRequest]:
    sample = sorted(question.requests, key=lambda one: one.arrival_s)
    gaps = [later.arrival_s - earlier.arrival_s for earlier, later in pairwise(sample)]
    gaps.append(sum(gaps) / len(gaps) if gaps else 1.0)
    time_s, span_s = 0.0, _span_s(question)
    for number in count():
        one = sample[number % len(sample)]
        if time_s > span_s:
            return
        name = RequestId(f"r{number}")
        yield SimulatedRequest(name, time_s, max(1, one.num_computed_tokens), max(1, one.num_answer_tokens))
        time_s += gaps[number % len(sample)]


def _span_s(question: PlanQuestion) -> float:
    """Return how long a simulation is, what comes before the change included: at least as long as the sample."""
    times = [one.arrival_s for one in question.requests]
    sample_s = max(1e-6, max(times) - min(times))
    span_s = min(question.horizon_s / (1 - WARM_UP), MOST_REQUESTS * sample_s / len(times))
    return max(span_s, sample_s / (1 - WARM_UP))


def _cluster(question: PlanQuestion, target: RoleCounts) -> ClusterSpec:
    present = [
        _instance(question, role, number)
        for role, number_of in question.placements[0].by_role().items()
        for number in range(number_of)
    ]
    flips, joins = changes_towards(target, [(instance.name, instance.role) for instance in present])
    spares = tuple(_instance(question, role, len(present) + number) for number, role in enumerate(joins))
    begin_s = WARM_UP * _span_s(question)
    commands = [TimedCommand(begin_s, flip) for flip in flips]
    commands += [TimedCommand(begin_s, Join(instance=one.name, role=one.role), question.join_s) for one in spares]
    link = LinkModel(bytes_per_s=_KV_BYTES / max(1e-9, question.hand_over_token_s), latency_s=question.hand_over_s)
    return ClusterSpec(
        instances=tuple(present),
        spares=spares,
        router=structs.replace(
            question.router,
            autoscale=None,
            replan=Replan.OFF,
            max_queued_requests=1 << 30,
            request_timeout_s=_PATIENT_S,
            instance_wait_s=_PATIENT_S,
        ),
        topology=Topology.one_node(link),
        faults=Faults(commands=tuple(commands)),
    )


def _instance(question: PlanQuestion, role: Role, number: int) -> InstanceSpec:
    return InstanceSpec(
        name=InstanceId(f"{role.value}-{number}"),
        role=role,
        scheduler=structs.replace(question.scheduler, tells_costs=question.router.predicts),
        num_blocks=max(1, question.pool_tokens // _BLOCK_SIZE),
        block_size=_BLOCK_SIZE,
        latency=LearnedLatency(question.prefill_costs, question.decode_costs),
        kv_bytes_per_token=_KV_BYTES,
    )
