"""From a search of one host's placements to a plan, in the same words as that of a cluster's."""

from collections.abc import Iterator, Sequence

from disagg.base.request import Role
from disagg.measure.statistics import Estimate
from disagg.placement.composition import Family
from disagg.placement.host_planner import HostProblem, JudgedHostPlacement, host_placements
from disagg.placement.plan import CORE, LosingPlacement, Plan, PlannedInstance, PlannedPlacement, SearchEffort

_SHOWN = 5


def describe_host(problem: HostProblem, judged: Sequence[JudgedHostPlacement], is_complete: bool) -> Plan:
    """Return the plan of placements that were judged, best first; there is at least one."""
    num_candidates = len(host_placements(problem))
    return Plan(
        model=next(iter(problem.platforms.values())).name,
        workload=problem.workload.name,
        target=problem.target,
        target_rate=None,
        placements=tuple(_planned(one) for one in judged[:_SHOWN]),
        losing=tuple(_losing(judged)),
        effort=SearchEffort(
            num_choices=num_candidates,
            num_refused=0,
            num_ruled_out=0,
            num_compositions=num_candidates,
            num_searches=sum(len(one.results) for one in judged),
            num_runs=sum(result.num_runs for one in judged for result in one.results),
            is_complete=is_complete,
        ),
        notes=problem.notes,
    )


def _planned(judged: JudgedHostPlacement) -> PlannedPlacement:
    candidate, report = judged.candidate, judged.results[0].report
    assert report is not None, "only placements with a goodput are described"
    cores = candidate.num_cores
    costs = {"ttft": 1 - report.ttft_attainment, "tpot": 1 - report.tpot_attainment}
    return PlannedPlacement(
        words=str(candidate),
        family=_family(judged),
        instances=tuple(
            PlannedInstance(
                role=group.role.value,
                kind=CORE,
                count=group.count,
                tensor_parallel=1,
                pipeline_parallel=1,
                batching="" if group.max_batch_tokens is None else f"{group.max_batch_tokens} tokens",
                num_threads=candidate.num_threads,
                goodput=None,
            )
            for group in candidate.placement.groups
        ),
        placement=candidate.placement,
        num_units=1,
        num_devices=cores,
        goodput=judged.goodput,
        goodput_per_device=Estimate(mean=judged.goodput.mean / cores, half_width=judged.goodput.half_width / cores),
        price_per_hour=None,
        watts=None,
        goodput_per_dollar=None,
        goodput_per_watt=None,
        bottleneck="time to the first token" if costs["ttft"] >= costs["tpot"] else "time per output token",
        attainment=report.attainment,
        ttft_p90_s=report.ttft.p90,
        tpot_p90_s=report.tpot.p90,
        objective_costs=costs,
    )


def _family(judged: JudgedHostPlacement) -> Family:
    return Family.ANYWHERE if judged.candidate.placement.count(Role.PREFILL) else Family.COLOCATED


def _losing(judged: Sequence[JudgedHostPlacement]) -> Iterator[LosingPlacement]:
    """Yield the best of each other number of instances, role and scheduling mode."""
    best = judged[0]
    seen = {_kind(best)}
    for one in judged[1:]:
        if _kind(one) in seen:
            continue
        seen.add(_kind(one))
        ratio = one.goodput.mean / best.goodput.mean - 1
        yield LosingPlacement(
            words=str(one.candidate),
            reason=f"{one.goodput.mean:.3g} requests/s, {ratio:+.0%}; held back by the {_planned(one).bottleneck}",
        )


def _kind(judged: JudgedHostPlacement) -> tuple[object, ...]:
    groups = judged.candidate.placement.groups
    return judged.candidate.num_threads, *((group.role, group.count, group.scheduling) for group in groups)
