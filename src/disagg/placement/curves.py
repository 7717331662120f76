"""How the best placements behave round the point that they were chosen at: other rates, other objectives."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from disagg.measure.statistics import Share
from disagg.placement.goodput_job import GoodputJob, run_at
from disagg.placement.judging import JudgedPlacement, unit_job
from disagg.placement.plan import PlannedCurve
from disagg.placement.planner import Search
from disagg.placement.workers import Workers

RATE_PARTS: Final = (0.4, 0.6, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5)
"""Of the best placement's goodput."""
SLO_SCALES: Final = (0.5, 0.7, 0.85, 1.0, 1.25, 1.6, 2.0)
"""Factors on all objectives: below 1 tighter (DistServe, section 6.2)."""


@dataclass(frozen=True)
class _Point:
    """One run of a unit."""

    job: GoodputJob
    rate: float


def attainment_curves(search: Search, workers: Workers) -> tuple[PlannedCurve, ...]:
    """Return, for the best placement and the best of each other family, attainment against rate and SLO scale.

    Rates are those of the whole placement; scales are tried at the best placement's goodput per device.
    """
    shown = best_of_families(search.judged)
    best = shown[0]
    per_device = best.goodput.mean / best.composition.num_devices
    points: list[_Point] = []
    for one in shown:
        job = unit_job(search.problem, search.phases.goodput, one.composition, one.placed, seed=0)
        rate = per_device * one.composition.num_devices / one.composition.num_units
        # Beyond the goodput queues grow, which a short run shows late.
        longest = replace(job, min_requests=job.max_requests)
        points += [_Point(longest if part > 1 else job, part * rate) for part in RATE_PARTS]
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


def best_of_families(judged: Sequence[JudgedPlacement]) -> list[JudgedPlacement]:
    """Return the best placement, and the best of up to two other families."""
    return list(_firsts(judged))[:3]


def _firsts(judged: Sequence[JudgedPlacement]) -> Iterator[JudgedPlacement]:
    seen = set()
    for one in judged:
        if one.composition.family not in seen and one.report is not None:
            seen.add(one.composition.family)
            yield one


def _attainment(point: _Point) -> Share:
    report = run_at(point.job, point.rate, gives_up=False)
    assert report is not None, "it was not given up"
    return Share.of(round(report.attainment * report.num_requests), report.num_requests)
