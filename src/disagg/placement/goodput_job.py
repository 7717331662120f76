"""One goodput search of one deployment, as data that a worker process takes, and what comes of it."""

import math
from dataclasses import dataclass
from typing import Final

from disagg.measure.goodput_search import bracket_goodput
from disagg.measure.open_loop import OpenLoop
from disagg.measure.slo import SloTarget
from disagg.measure.windows import with_requests
from disagg.simulator.cluster import ClusterSpec
from disagg.simulator.evaluate import run_workload
from disagg.simulator.run_report import RunReport
from disagg.simulator.simulation import TargetLostError

TOLERANCE: Final = 0.04
GUESS_GROWTH: Final = 1.25
"""From one rate to the next until the goodput is bracketed, where the first is a guess from a bound."""
KNOWN_GROWTH: Final = 1.08
"""The same where something alike was simulated before."""
MAX_STEPS: Final = 14


@dataclass(frozen=True, kw_only=True)
class GoodputJob:
    """Search the goodput of ``spec`` with the requests of one seed, beginning at ``start_rate``.

    A run at rate r has ``min_requests``, or ``requests_per_rate`` x r where that is more, but ``max_requests`` at most.
    """

    spec: ClusterSpec
    workload: OpenLoop
    target: SloTarget
    start_rate: float
    seed: int
    min_requests: int
    max_requests: int
    requests_per_rate: float
    tolerance: float = TOLERANCE
    growth: float = GUESS_GROWTH
    most_rate: float = math.inf
    """What a bound allows: a short run may keep more, as its queues are empty at first."""


@dataclass(frozen=True, kw_only=True)
class JobResult:
    """The highest rate that kept the target, 0 where none did, the run at it, and how many runs were made."""

    rate: float
    report: RunReport | None
    num_runs: int


def run_goodput_job(job: GoodputJob) -> JobResult:
    """Search. Raises ConfigurationError when a request can never fit."""
    reports: dict[float, RunReport | None] = {}

    def meets(rate: float) -> bool:
        if rate > job.most_rate:
            return False
        report = run_at(job, rate)
        reports[rate] = report
        return report is not None and job.target.is_met(report.attainment, report.percentiles())

    bracket = bracket_goodput(
        meets, min(job.start_rate, job.most_rate), tolerance=job.tolerance, max_doublings=MAX_STEPS, growth=job.growth
    )
    return JobResult(rate=bracket.met, report=reports.get(bracket.met), num_runs=len(reports))


def run_at(job: GoodputJob, rate: float, *, gives_up: bool = True) -> RunReport | None:
    """Return the report of one run; None where it ``gives_up``, as more requests than may missed their objectives."""
    count = round(min(max(job.min_requests, rate * job.requests_per_rate), job.max_requests))
    workload = with_requests(job.workload, count).at_rate(rate)
    most_misses = math.floor(count * (1 - job.target.attainment) + 1e-9) if gives_up else math.inf
    try:
        return run_workload(job.spec, workload, job.target.slo, job.seed, most_misses=most_misses)
    except TargetLostError:
        return None
