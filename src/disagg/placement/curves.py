"""How the best placements behave round the point that they were chosen at: other rates, objectives and prompts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from disagg.base.errors import ConfigurationError
from disagg.measure.statistics import Share
from disagg.measure.windows import with_prompts
from disagg.placement.goodput_job import GoodputJob, run_at, run_goodput_job
from disagg.placement.judging import JudgedPlacement, unit_job
from disagg.placement.plan import PlannedCurve, PromptShift
from disagg.placement.planner import Search
from disagg.placement.workers import Workers

RATE_PARTS: Final = (0.4, 0.6, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5)
"""Of the best placement's goodput."""
SLO_SCALES: Final = (0.5, 0.7, 0.85, 1.0, 1.25, 1.6, 2.0)
"""Factors on all objectives: below 1 tighter (DistServe, section 6.2)."""
PROMPT_FACTORS: Final = (0.5, 0.75, 1.5, 2.0)
_COARSE: Final = 0.08


@dataclass(frozen=True)
class _Point:
    """One run of a unit."""

    job: GoodputJob
    rate: float


def attainment_curves(search: Search, workers: Workers) -> tuple[PlannedCurve, ...]:
    """Return, for the best placement and the best of each other family, attainment against rate and SLO scale.

    Rates are those of the whole placement; scales are tried at the best placement's goodput per device.
    """
    shown = _best_of_families(search.judged)
    best = shown[0]
    per_device = best.goodput.mean / best.composition.num_devices
    points: list[_Point] = []
    for one in shown:
        job = unit_job(search.problem, search.phases.goodput, one.composition, one.placed, seed=0)
        rate = per_device * one.composition.num_devices / one.composition.num_units
        points += [_Point(job, part * rate) for part in RATE_PARTS]
        points += [_Point(replace(job, target=job.target.scaled(scale)), rate) for scale in SLO_SCALES]
    attainments = workers.map(_attainment, points)
    curves = []
    for one in shown:
        rates = tuple(part * per_device for part in RATE_PARTS)
        words = str(one.composition)
        reached = tuple(next(attainments) for _ in RATE_PARTS)
        curves.append(PlannedCurve(words=words, over="rate per device", x=rates, attainment=reached))
        reached = tuple(next(attainments) for _ in SLO_SCALES)
        curves.append(PlannedCurve(words=words, over="SLO scale", x=SLO_SCALES, attainment=reached))
    return tuple(curves)


def prompt_shifts(search: Search, workers: Workers) -> tuple[PromptShift, ...]:
    """Return which of the judged placements is best, per device, when prompts are longer or shorter."""
    shown = _best_of_families(search.judged)
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
        rates = {}
        for one in shown:
            rates[one] = next(results) * one.composition.num_units / one.composition.num_devices
        best = max(rates, key=rates.__getitem__)
        shifts.append(
            PromptShift(
                factor=factor,
                best=str(best.composition),
                is_same=best is shown[0],
                goodput_per_device=rates[best],
                chosen_per_device=rates[shown[0]],
            )
        )
    return tuple(shifts)


def _best_of_families(judged: Sequence[JudgedPlacement]) -> list[JudgedPlacement]:
    return list(_firsts(judged))[:3]


def _firsts(judged: Sequence[JudgedPlacement]) -> Iterator[JudgedPlacement]:
    seen = set()
    for one in judged:
        if one.composition.family not in seen and one.report is not None:
            seen.add(one.composition.family)
            yield one


def _rate_or_none(job: GoodputJob) -> float:
    """Return the goodput; 0 where the longest prompts do not fit."""
    try:
        return run_goodput_job(job).rate
    except ConfigurationError:
        return 0.0


def _attainment(point: _Point) -> Share:
    report = run_at(point.job, point.rate, gives_up=False)
    assert report is not None, "it was not given up"
    return Share.of(round(report.attainment * report.num_requests), report.num_requests)
