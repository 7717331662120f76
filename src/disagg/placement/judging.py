"""The last few placements: a whole unit of each is simulated, hand-overs and all, with several seeds."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from disagg.base.errors import ConfigurationError
from disagg.base.request import Role
from disagg.measure.statistics import Estimate
from disagg.placement.composition import Composition, Goodputs, score
from disagg.placement.goodput_job import KNOWN_GROWTH, GoodputJob, JobResult, run_goodput_job
from disagg.placement.layout import PlacedInstance, cluster_of, lay_out
from disagg.placement.phases import requests_per_rate
from disagg.placement.plan import OneRouter
from disagg.placement.problem import PlanProblem
from disagg.placement.shapes import build_choice
from disagg.placement.workers import Workers
from disagg.simulator.run_report import RunReport

_ANSWERS: Final = 4.0
_CLOSER: Final = 3
"""Placements that are judged with all seeds, the best by the first."""
_WHOLE_REQUESTS: Final = 1200
_WHOLE_TOLERANCE: Final = 0.1


@dataclass(frozen=True)
class JudgedPlacement:
    """A composition on its devices, with the goodput of the whole, and the search of a unit for each seed."""

    composition: Composition
    placed: tuple[PlacedInstance, ...]
    goodput: Estimate
    results: tuple[JobResult, ...]

    @property
    def report(self) -> RunReport | None:
        """The run of a unit at its goodput; None where no rate was kept, or nothing was simulated."""
        return self.results[0].report if self.results else None

    @property
    def crosses_nodes(self) -> bool:
        """Whether the unit that was simulated is on several nodes."""
        return len({device.node for one in self.placed if one.unit == 0 for device in one.place}) > 1

    @property
    def is_added_up(self) -> bool:
        """Whether its goodput is that of its parts, each simulated apart."""
        return self.composition.num_units > 1 or bool(self.composition.extra)

    @property
    def num_runs(self) -> int:
        """Runs that were simulated."""
        return sum(result.num_runs for result in self.results)

    @property
    def words(self) -> str:
        """The composition and its rate."""
        return f"{self.composition}: {self.goodput.mean:.3g} requests/s"


def judge(
    problem: PlanProblem, goodputs: Goodputs, bounds: Goodputs, compositions: Sequence[Composition], workers: Workers
) -> Iterator[JudgedPlacement]:
    """Yield each composition that fits on the devices with its goodput; those that may still win with all seeds."""
    fitting = [(one, placed) for one in compositions if (placed := _placed(problem, one)) is not None]
    firsts = [
        replace(
            unit_job(problem, goodputs, one, placed, seed=0), growth=KNOWN_GROWTH, most_rate=_unit_rate(one, bounds)
        )
        for one, placed in fitting
    ]
    found = [
        _judged(goodputs, one, placed, (result,))
        for (one, placed), result in zip(fitting, workers.map(run_goodput_job, firsts), strict=True)
    ]
    found.sort(key=lambda one: score(problem, one.composition, one.goodput.mean), reverse=True)
    closer, others = found[:_CLOSER], found[_CLOSER:]
    seeds = range(1, problem.num_seeds)
    jobs = [
        replace(
            unit_job(problem, goodputs, one.composition, one.placed, seed),
            start_rate=one.results[0].rate or 1.0,
            growth=KNOWN_GROWTH,
            most_rate=_unit_rate(one.composition, bounds),
        )
        for one in closer
        for seed in seeds
    ]
    more = workers.map(run_goodput_job, jobs)
    for one in closer:
        results = (*one.results, *(next(more) for _ in seeds))
        yield _judged(goodputs, one.composition, one.placed, results)
    yield from others


def unjudged(problem: PlanProblem, goodputs: Goodputs, composition: Composition) -> JudgedPlacement | None:
    """Return a composition with the goodput that its phases alone promise; None where it does not fit."""
    placed = _placed(problem, composition)
    if placed is None:
        return None
    return JudgedPlacement(composition, tuple(placed), Estimate.of([composition.rate(goodputs)]), ())


def serve_behind_one_router(problem: PlanProblem, goodputs: Goodputs, judged: JudgedPlacement) -> OneRouter:
    """Return what the whole placement serves of its goodput, or of the target rate, when one router serves it all."""
    asked = judged.goodput.mean if problem.target_rate is None else min(problem.target_rate, judged.goodput.mean)
    job = replace(
        unit_job(problem, goodputs, judged.composition, judged.placed, seed=0),
        spec=cluster_of(problem, judged.placed, judged.composition.codec),
        start_rate=asked,
        most_rate=asked,
        growth=KNOWN_GROWTH,
        max_requests=_WHOLE_REQUESTS,
        tolerance=_WHOLE_TOLERANCE,
    )
    return OneRouter(asked=asked, served=run_goodput_job(job).rate)


def _placed(problem: PlanProblem, composition: Composition) -> list[PlacedInstance] | None:
    try:
        return lay_out(problem, composition)
    except ConfigurationError:
        return None


def unit_job(
    problem: PlanProblem, goodputs: Goodputs, composition: Composition, placed: Sequence[PlacedInstance], seed: int
) -> GoodputJob:
    """Return the search of the goodput of one unit, on the devices of the first."""
    one_unit = [one for one in placed if one.unit == 0]
    expected = _unit_rate(composition, goodputs)
    decoding = next(choice for choice, _ in composition.unit if choice.role is not Role.PREFILL)
    return GoodputJob(
        spec=cluster_of(problem, one_unit, composition.codec),
        workload=problem.workload,
        target=problem.target,
        start_rate=expected,
        seed=seed,
        min_requests=problem.min_requests,
        max_requests=2 * problem.max_requests,
        requests_per_rate=requests_per_rate(problem, build_choice(problem, decoding), _ANSWERS),
    )


def _unit_rate(composition: Composition, goodputs: Goodputs) -> float:
    """Return what the instances of one unit reach, as far as their phases alone decide."""
    return replace(composition, num_units=1, extra=()).rate(goodputs)


def _judged(
    goodputs: Goodputs,
    composition: Composition,
    placed: Sequence[PlacedInstance],
    results: tuple[JobResult, ...],
) -> JudgedPlacement:
    extra_rate = sum(goodputs(choice) * count for choice, count in composition.extra)
    rates = [result.rate * composition.num_units + extra_rate for result in results]
    return JudgedPlacement(composition, tuple(placed), Estimate.of(rates), results)
