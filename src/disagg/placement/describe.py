"""From a search to a plan: figures of the best placements, and in words why the others lose."""

import math
from collections.abc import Iterator, Sequence
from typing import Final

from disagg.base.request import Role
from disagg.measure.statistics import Estimate
from disagg.placement.composition import Composition, Family
from disagg.placement.judging import JudgedPlacement
from disagg.placement.layout import placement_of
from disagg.placement.plan import LosingPlacement, Plan, PlannedInstance, PlannedPlacement, SearchEffort
from disagg.placement.planner import Search
from disagg.placement.problem import CostUnit, PlanProblem

_NEAR: Final = 0.1
"""Phases whose goodputs differ by less share the blame."""


def describe(search: Search, num_shown: int = 5) -> Plan:
    """Return the plan of a search that judged at least one placement."""
    problem = search.problem
    best, *others = search.judged
    return Plan(
        model=next(iter(problem.platforms.values())).name,
        workload=problem.workload.name,
        target=problem.target,
        target_rate=problem.target_rate,
        placements=tuple(
            _planned(search, one)
            for number, one in enumerate(search.judged)
            if number < num_shown or one.composition in search.beside
        ),
        losing=tuple(_losing(search, best, others)),
        effort=SearchEffort(
            num_choices=len(search.shapes.built),
            num_refused=len(search.shapes.refused),
            num_ruled_out=len(search.ruled_out),
            num_compositions=search.num_compositions,
            num_searches=len(search.phases.known) + problem.num_seeds * len(search.judged),
            num_runs=sum(result.num_runs for result in search.phases.known.values())
            + sum(one.num_runs for one in search.judged),
            is_complete=search.is_complete,
        ),
        behind_one_router=search.behind_one_router,
    )


def _planned(search: Search, judged: JudgedPlacement) -> PlannedPlacement:
    problem, composition, report = search.problem, judged.composition, judged.report
    dollars, watts = (_known_cost(problem, composition, unit) for unit in (CostUnit.DOLLAR, CostUnit.WATT))
    rate = judged.goodput.mean
    return PlannedPlacement(
        words=str(composition),
        family=composition.family,
        instances=tuple(
            PlannedInstance(
                role=choice.role.value,
                kind=choice.kind,
                count=sum(one.choice == choice for one in judged.placed),
                tensor_parallel=choice.tensor_parallel,
                pipeline_parallel=choice.pipeline_parallel,
                batching=str(choice.batching),
                num_threads=None,
                goodput=search.phases.goodput(choice),
            )
            for choice in composition.choices
        ),
        placement=placement_of(judged.placed, composition.codec),
        num_units=composition.num_units,
        num_devices=composition.num_devices,
        goodput=judged.goodput,
        goodput_per_device=Estimate(
            mean=rate / composition.num_devices, half_width=judged.goodput.half_width / composition.num_devices
        ),
        price_per_hour=dollars,
        watts=watts,
        goodput_per_dollar=rate / dollars if dollars else None,
        goodput_per_watt=rate / watts if watts else None,
        bottleneck=bottleneck(search, judged),
        attainment=report.attainment if report else 0.0,
        ttft_p90_s=report.ttft.p90 if report else math.nan,
        tpot_p90_s=report.tpot.p90 if report else math.nan,
        objective_costs={"ttft": 1 - report.ttft_attainment, "tpot": 1 - report.tpot_attainment} if report else {},
    )


def _known_cost(problem: PlanProblem, composition: Composition, unit: CostUnit) -> float | None:
    nodes = problem.topology.nodes
    known = all(node.price_per_hour if unit is CostUnit.DOLLAR else node.watts for node in nodes)
    return composition.cost(problem, unit) if known else None


def bottleneck(search: Search, judged: JudgedPlacement) -> str:
    """Return what holds a placement back: a phase and what limits it there, or the network."""
    composition = judged.composition
    if composition.family is Family.COLOCATED:
        choice = composition.choices[0]
        return search.phases.phases[choice].bound.limited_by
    rates: dict[Role, float] = {}
    limits: dict[Role, str] = {}
    for choice, count in composition.unit:
        rates[choice.role] = search.phases.goodput(choice) * count * composition.num_units
        limits[choice.role] = search.phases.phases[choice].bound.limited_by
    least, most = sorted((Role.PREFILL, Role.DECODE), key=rates.__getitem__)
    if composition.hand_over_rate < rates[least] and judged.crosses_nodes:
        return f"the network: KV of {composition.hand_over_rate:.3g} requests/s in time"
    spare = 1 - rates[least] / rates[most]
    if spare < _NEAR:
        return "both phases alike"
    return f"{least.value}: {limits[least]}; {most.value} has {spare:.0%} to spare"


def _losing(search: Search, best: JudgedPlacement, others: Sequence[JudgedPlacement]) -> Iterator[LosingPlacement]:
    """Yield those that were given, the best of each other family, and the parallelisms never in question."""
    seen = {best.composition.family}
    for other in others:
        family = other.composition.family
        if other.composition in search.beside:
            yield LosingPlacement(words=f"that beside: {other.composition}", reason=_why(search, best, other))
        elif family not in seen:
            yield LosingPlacement(words=f"{family.value}: {other.composition}", reason=_why(search, best, other))
        seen.add(family)
    if Role.COLOCATED not in search.problem.rules.schedulers:
        yield LosingPlacement(
            words="colocated", reason=f"the rules of {search.problem.rules.name} know no colocated instances"
        )
    for role in search.problem.rules.schedulers:
        out = [phase for phase in search.ruled_out if phase.built.choice.role is role]
        if out:
            phase = out[0]
            yield LosingPlacement(words=str(phase.built.choice), reason=phase.bound.limited_by)
    if search.shapes.refused:
        refusal = search.shapes.refused[0]
        yield LosingPlacement(words=str(refusal.choice), reason=refusal.reason)


def _why(search: Search, best: JudgedPlacement, other: JudgedPlacement) -> str:
    if other.report is None:
        return "keeps the objectives at no rate that was tried"
    ours = best.goodput.mean / best.composition.num_devices
    theirs = other.goodput.mean / other.composition.num_devices
    return (
        f"{theirs:.3g} requests/s per device, {theirs / ours - 1:+.0%}, {other.goodput.mean:.3g} in all, "
        f"{other.goodput.mean / best.goodput.mean - 1:+.0%}; held back by {bottleneck(search, other)}"
    )
