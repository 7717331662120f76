"""Devices that the units of a placement leave free: colocated instances serve on them beside the others."""

from collections.abc import Iterable
from dataclasses import replace

from disagg.base.errors import ConfigurationError
from disagg.base.request import Role
from disagg.placement.composition import Composition, Family, Goodputs, score
from disagg.placement.instance_choice import InstanceChoice
from disagg.placement.layout import lay_out
from disagg.placement.problem import PlanProblem


def fill_up(
    problem: PlanProblem, composition: Composition, colocated: Iterable[InstanceChoice], goodputs: Goodputs
) -> Composition | None:
    """Return the composition with colocated instances on what it leaves free; None where that is no better."""
    best = composition
    for choice in sorted(colocated, key=lambda one: (-goodputs(one) / one.num_devices, one.order)):
        wider = _with_one_more(best, choice)
        while _score(problem, wider, goodputs) > _score(problem, best, goodputs) and _fits(problem, wider):
            best, wider = wider, _with_one_more(wider, choice)
    return None if best is composition else best


def _with_one_more(composition: Composition, choice: InstanceChoice) -> Composition:
    counts = dict(composition.extra)
    counts[choice] = counts.get(choice, 0) + 1
    is_mixed = any(one.role is not Role.COLOCATED for one, _ in composition.unit)
    return replace(composition, family=Family.MIXED if is_mixed else Family.COLOCATED, extra=tuple(counts.items()))


def _score(problem: PlanProblem, composition: Composition, goodputs: Goodputs) -> tuple[float, ...]:
    return score(problem, composition, composition.rate(goodputs))


def _fits(problem: PlanProblem, composition: Composition) -> bool:
    try:
        lay_out(problem, composition)
    except ConfigurationError:
        return False
    return True
