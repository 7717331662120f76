"""The last few placements: a whole unit of each is simulated, hand-overs and all, with several seeds."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from disagg.base.errors import ConfigurationError
from disagg.base.request import Role
from disagg.measure.statistics import Estimate
from disagg.placement.composition import Composition, Goodputs
from disagg.placement.goodput_job import GoodputJob, JobResult, run_goodput_job
from disagg.placement.layout import PlacedInstance, cluster_of, lay_out
from disagg.placement.phases import answer_s
from disagg.placement.problem import PlanProblem
from disagg.placement.shapes import build_choice
from disagg.placement.workers import Workers
from disagg.simulator.run_report import RunReport

_START: Final = 0.85
"""Of what the phases alone promise: both objectives at once, and the hand-over, cost some."""


@dataclass(frozen=True)
class JudgedPlacement:
    """A composition on its devices, with the goodput of the whole and a run at it; None where no rate was kept."""

    composition: Composition
    placed: tuple[PlacedInstance, ...]
    goodput: Estimate
    report: RunReport | None
    num_runs: int

    @property
    def words(self) -> str:
        """The composition and its rate."""
        return f"{self.composition}: {self.goodput.mean:.3g} requests/s"


def judge(
    problem: PlanProblem, goodputs: Goodputs, compositions: Sequence[Composition], workers: Workers
) -> Iterator[JudgedPlacement]:
    """Yield each composition that fits on the devices, judged."""
    fitting = [(one, placed) for one in compositions if (placed := _placed(problem, one)) is not None]
    seeds = range(problem.num_seeds)
    jobs = [unit_job(problem, goodputs, one, placed, seed) for one, placed in fitting for seed in seeds]
    results = workers.map(run_goodput_job, jobs)
    for one, placed in fitting:
        found = [next(results) for _ in range(problem.num_seeds)]
        yield _judged(one, placed, found, sum(goodputs(choice) * count for choice, count in one.extra))


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
    expected = replace(composition, num_units=1, extra=()).rate(goodputs)
    decoding = next(choice for choice, _ in composition.unit if choice.role is not Role.PREFILL)
    return GoodputJob(
        spec=cluster_of(problem, one_unit),
        workload=problem.workload,
        target=problem.target,
        start_rate=expected * _START,
        seed=seed,
        min_requests=problem.min_requests,
        max_requests=2 * problem.max_requests,
        requests_per_rate=4 * answer_s(problem, build_choice(problem, decoding)),
    )


def _judged(
    composition: Composition, placed: Sequence[PlacedInstance], results: Sequence[JobResult], extra_rate: float
) -> JudgedPlacement:
    rates = [result.rate * composition.num_units + extra_rate for result in results]
    return JudgedPlacement(
        composition=composition,
        placed=tuple(placed),
        goodput=Estimate.of(rates),
        report=results[0].report,
        num_runs=sum(result.num_runs for result in results),
    )
