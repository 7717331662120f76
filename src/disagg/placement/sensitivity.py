"""How far the rate or the prompts may change before another placement is the answer."""

from dataclasses import replace
from typing import Final

from disagg.base.errors import ConfigurationError
from disagg.measure.windows import with_prompts
from disagg.placement.composition import compose, score
from disagg.placement.curves import best_of_families
from disagg.placement.goodput_job import GoodputJob, run_goodput_job
from disagg.placement.judging import unit_job
from disagg.placement.plan import PromptShift, RateShift
from disagg.placement.planner import Search
from disagg.placement.workers import Workers

PROMPT_FACTORS: Final = (0.5, 0.75, 1.5, 2.0)
RATE_FACTORS: Final = (0.25, 0.5, 0.75, 1.25, 1.5, 2.0, 3.0, 4.0)
_COARSE: Final = 0.08


def rate_shifts(search: Search) -> tuple[RateShift, ...]:
    """Return what the plan would be at other target rates, by the goodputs of instances that the search knows.

    Nothing where no target rate was asked for: then the plan is for the most.
    """
    problem = search.problem
    if problem.target_rate is None:
        return ()
    shifts = []
    for factor in RATE_FACTORS:
        other = replace(problem, target_rate=problem.target_rate * factor)
        goodput = search.phases.goodput
        known = [choice for choice, result in search.phases.known.items() if result.rate > 0]
        best = max(compose(other, known, goodput), key=lambda one: score(other, one, one.rate(goodput)))
        shifts.append(
            RateShift(
                rate=problem.target_rate * factor,
                best=str(best),
                num_devices=best.num_devices,
                is_reached=best.rate(goodput) >= problem.target_rate * factor,
                has_same_instances=set(best.choices) == set(search.judged[0].composition.choices),
            )
        )
    return tuple(shifts)


def prompt_shifts(search: Search, workers: Workers) -> tuple[PromptShift, ...]:
    """Return which of the judged placements is best, per device, when prompts are longer or shorter."""
    shown = best_of_families(search.judged)
    jobs = []
    for factor in PROMPT_FACTORS:
        for one in shown:
            job = unit_job(search.problem, search.phases.goodput, one.composition, one.placed, seed=0)
            start_rate = one.goodput.mean / one.composition.num_units / max(1.0, factor)
            workload = with_prompts(job.workload, factor)
            jobs.append(replace(job, workload=workload, start_rate=start_rate or job.start_rate, tolerance=_COARSE))
    results = workers.map(_rate_or_none, jobs)
    shifts = []
    for factor in PROMPT_FACTORS:
        rates = [next(results) * one.composition.num_units / one.composition.num_devices for one in shown]
        best = max(range(len(shown)), key=rates.__getitem__)
        shifts.append(
            PromptShift(
                factor=factor,
                best=str(shown[best].composition),
                is_same=best == 0,
                goodput_per_device=rates[best],
                chosen_per_device=rates[0],
            )
        )
    return tuple(shifts)


def _rate_or_none(job: GoodputJob) -> float:
    """Return the goodput; 0 where the longest prompts do not fit."""
    try:
        return run_goodput_job(job).rate
    except ConfigurationError:
        return 0.0
