"""The planner: bounds first, then phases alone, then whole placements, each only as far as it may still win."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from disagg.base.errors import ConfigurationError
from disagg.base.request import Role
from disagg.placement.composition import Composition, Family, compose, score
from disagg.placement.goodput_job import JobResult, run_goodput_job
from disagg.placement.instance_choice import InstanceChoice
from disagg.placement.judging import JudgedPlacement, judge, serve_behind_one_router, unjudged
from disagg.placement.mixing import fill_up
from disagg.placement.phases import MOST_BUSY, PhaseChoice, bound_choice, other_batchings, phase_job
from disagg.placement.plan import OneRouter
from disagg.placement.problem import PlanProblem
from disagg.placement.progress import OnProgress, PlanProgress
from disagg.placement.shapes import FoundShapes, build_choice, find_shapes
from disagg.placement.workers import Workers

_WAVE: Final = 4
"""Searches that are decided on together: fixed, so that the plan does not depend on the number of cores."""
_MOST_WAVES: Final = 8
_KEPT_CHOICES: Final = 24
"""Of a role and kind of device, the best by their estimates."""
_LEADERS: Final = 3
"""Compositions that must be known in full before the search of phases ends, beside the best of each family."""
_FINALISTS: Final = 5


@dataclass
class PhaseSearch:
    """Goodputs of single instances: known ones, and estimates from their bounds for the others."""

    problem: PlanProblem
    phases: dict[InstanceChoice, PhaseChoice]
    known: dict[InstanceChoice, JobResult] = field(default_factory=dict)

    def goodput(self, choice: InstanceChoice) -> float:
        """Return the goodput, or the estimate times what known ones of the role reached of theirs at best."""
        result = self.known.get(choice)
        if result is not None:
            return result.rate
        return min(self.bound(choice), self.phases[choice].estimate * self._reached(choice.role))

    def bound(self, choice: InstanceChoice) -> float:
        """Return what it can serve for long."""
        return MOST_BUSY * self.phases[choice].bound.rate

    def _reached(self, role: Role) -> float:
        parts = [
            result.rate / self.phases[choice].estimate for choice, result in self.known.items() if choice.role is role
        ]
        return max(parts, default=1.0)

    def search(self, choices: Sequence[InstanceChoice], workers: Workers) -> None:
        """Simulate these choices in their phases."""
        roles = {choice.role for choice, result in self.known.items() if result.rate > 0}
        jobs = [
            phase_job(self.problem, self.phases[choice], self.goodput(choice) if choice.role in roles else None)
            for choice in choices
        ]
        self.known |= dict(zip(choices, workers.map(run_goodput_job, jobs), strict=True))

    def usable(self) -> list[InstanceChoice]:
        """Return the choices that are not known to serve nothing."""
        return [choice for choice in self.phases if self.goodput(choice) > 0]


@dataclass(frozen=True)
class Search:
    """Everything that a search found; ``is_complete`` is False when it was stopped."""

    problem: PlanProblem
    shapes: FoundShapes
    ruled_out: tuple[PhaseChoice, ...]
    phases: PhaseSearch
    num_compositions: int
    judged: tuple[JudgedPlacement, ...]
    behind_one_router: OneRouter | None
    """None where the best is one unit, or the search was stopped."""
    is_complete: bool
    beside: tuple[Composition, ...] = ()
    """Placements that were given, to be judged like those that were found."""


def search(
    problem: PlanProblem, workers: Workers, on_progress: OnProgress, beside: Sequence[Composition] = ()
) -> Search:
    """Search the best placements. A KeyboardInterrupt ends it with what is known by then, if that is a placement.

    Those given as ``beside`` are judged too. Raises ConfigurationError, with the figure that is in the way, when the
    model fits nowhere, also as they have it, or no instance can keep the objectives.
    """
    shapes = find_shapes(problem)
    bounded = [bound_choice(problem, built) for built in shapes.built]
    possible = [phase for phase in bounded if phase.bound.rate > 0]
    ruled_out = tuple(phase for phase in bounded if phase.bound.rate <= 0)
    _check(problem, shapes, possible, ruled_out)
    phases = PhaseSearch(problem, {phase.built.choice: phase for phase in _keep(problem, possible)})
    given = dict.fromkeys(choice for one in beside for choice in one.choices)
    phases.phases |= {
        choice: bound_choice(problem, build_choice(problem, choice)) for choice in given if choice not in phases.phases
    }
    judged: list[JudgedPlacement] = []
    num_compositions = 0
    behind_one_router = None
    is_complete = True
    try:
        leaders, num_compositions = _search_phases(problem, phases, workers, on_progress)
        leaders = _refine(problem, phases, leaders, workers)
        leaders = _with_mixed(problem, phases, leaders)
        phases.search([choice for choice in given if choice not in phases.known], workers)
        found = {(one.unit, one.num_units, one.extra) for one in leaders}
        leaders += [one for one in beside if (one.unit, one.num_units, one.extra) not in found]
        for one in judge(problem, phases.goodput, phases.bound, leaders, workers):
            judged.append(one)
            on_progress(PlanProgress(len(phases.known) + len(judged), len(phases.known) + len(leaders), one.words))
        judged.sort(key=lambda one: _judgement(problem, one), reverse=True)
        if judged and judged[0].report is not None and judged[0].is_added_up:
            behind_one_router = serve_behind_one_router(problem, phases.goodput, judged[0])
    except KeyboardInterrupt:
        is_complete = False
        judged = judged or _best_of_known(problem, phases)
        if not judged:
            raise
        judged.sort(key=lambda one: _judgement(problem, one), reverse=True)
    return Search(
        problem,
        shapes,
        ruled_out,
        phases,
        num_compositions,
        tuple(judged),
        behind_one_router,
        is_complete,
        tuple(beside),
    )


def _judgement(problem: PlanProblem, judged: JudgedPlacement) -> tuple[float, ...]:
    """Return how good a placement is, its rate as it is printed. Of equals the one with more requests to spare."""
    attainment = 0.0 if judged.report is None else judged.report.attainment
    return (*score(problem, judged.composition, float(f"{judged.goodput.mean:.3g}")), attainment)


def _check(
    problem: PlanProblem, shapes: FoundShapes, possible: Sequence[PhaseChoice], ruled_out: Sequence[PhaseChoice]
) -> None:
    if not shapes.built:
        raise ConfigurationError(f"the model fits nowhere on this cluster: {shapes.why_none()}")
    roles = {phase.built.choice.role for phase in possible}
    if Role.COLOCATED in roles or {Role.PREFILL, Role.DECODE} <= roles:
        return
    missing = next(role for role in problem.rules.schedulers if role not in roles)
    quickest = max(
        (phase for phase in ruled_out if phase.built.choice.role is missing),
        key=lambda phase: phase.built.choice.tensor_parallel,
        default=None,
    )
    if quickest is None:
        raise ConfigurationError(f"no {missing.value} instance fits on this cluster: {shapes.why_none()}")
    raise ConfigurationError(
        f"no instance keeps {problem.target}: {quickest.bound.limited_by}, even with {quickest.built.choice}; loosen "
        "the objectives, or use quicker devices"
    )


def _keep(problem: PlanProblem, possible: Sequence[PhaseChoice]) -> list[PhaseChoice]:
    """Return the most promising choices of each role and kind, in a fixed order."""
    groups: dict[tuple[Role, str], list[PhaseChoice]] = {}
    for phase in possible:
        choice = phase.built.choice
        groups.setdefault((choice.role, choice.kind), []).append(phase)
    kept = []
    for group in groups.values():
        group.sort(key=lambda phase: (-phase.estimate / phase.built.choice.num_devices, phase.built.choice.order))
        kept += group[:_KEPT_CHOICES]
    return kept


def _search_phases(
    problem: PlanProblem, phases: PhaseSearch, workers: Workers, on_progress: OnProgress
) -> tuple[list[Composition], int]:
    """Simulate phases until the best compositions are made of known ones; return them, best first."""
    leaders: list[Composition] = []
    count = 0
    for _ in range(_MOST_WAVES):
        ranked = _ranked(problem, phases)
        count = max(count, len(ranked))
        leaders = _leaders(ranked)
        unknown = [choice for one in leaders for choice in one.choices if choice not in phases.known]
        wave = list(dict.fromkeys(unknown))[:_WAVE]
        if not wave:
            break
        phases.search(wave, workers)
        on_progress(PlanProgress(len(phases.known), len(phases.known) + len(set(unknown)), str(leaders[0])))
    known = [one for one in _ranked(problem, phases) if all(choice in phases.known for choice in one.choices)]
    return _leaders(known), count


def _best_of_known(problem: PlanProblem, phases: PhaseSearch) -> list[JudgedPlacement]:
    """Return the best placement as far as phases alone tell; nothing where too few of them are known."""
    known = [one for one in _ranked(problem, phases) if all(choice in phases.known for choice in one.choices)]
    found = (unjudged(problem, phases.goodput, one) for one in known)
    return list(islice((one for one in found if one is not None), 1))


def _ranked(problem: PlanProblem, phases: PhaseSearch) -> list[Composition]:
    found = compose(problem, phases.usable(), phases.goodput)
    return sorted(found, key=lambda one: score(problem, one, one.rate(phases.goodput)), reverse=True)


def _leaders(ranked: Sequence[Composition]) -> list[Composition]:
    """Return the first few, and the first of each family that is not among them."""
    leaders = list(ranked[:_LEADERS])
    for family in Family:
        first = next((one for one in ranked if one.family is family), None)
        if first is not None and first not in leaders:
            leaders.append(first)
    return leaders


def _with_mixed(problem: PlanProblem, phases: PhaseSearch, leaders: Sequence[Composition]) -> list[Composition]:
    """Return the finalists: the leaders, and what each becomes with colocated instances on the devices left over."""
    colocated = [choice for choice, result in phases.known.items() if choice.role is Role.COLOCATED and result.rate > 0]
    found = list(leaders)
    for one in leaders:
        mixed = fill_up(problem, one, colocated, phases.goodput)
        if mixed is not None:
            found.append(mixed)
    found.sort(key=lambda one: score(problem, one, one.rate(phases.goodput)), reverse=True)
    return _leaders(found)[:_FINALISTS]


def _refine(
    problem: PlanProblem, phases: PhaseSearch, leaders: list[Composition], workers: Workers
) -> list[Composition]:
    """Try the other batchings of the leaders' choices, and rank again."""
    wanted = dict.fromkeys(choice for one in leaders[:_LEADERS] for choice in one.choices)
    added = [
        phase for choice in wanted for phase in other_batchings(problem, phases.phases[choice]) if phase.bound.rate > 0
    ]
    phases.phases |= {phase.built.choice: phase for phase in added}
    for start in range(0, len(added), _WAVE):
        phases.search([phase.built.choice for phase in added[start : start + _WAVE]], workers)
    if not added:
        return leaders
    known = [one for one in _ranked(problem, phases) if all(choice in phases.known for choice in one.choices)]
    return _leaders(known)
