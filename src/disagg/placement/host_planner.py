"""Plans for the cores of one host, from a profile of it: threads, roles, scheduling modes, batch budgets.

Instances of one host disturb each other, so nothing is simulated in phases: every placement is simulated whole. Few
fit on few cores, and they are halved round by round: the better part goes on to more requests and seeds.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from statistics import fmean
from typing import Final

from disagg.base.config import (
    CacheSettings,
    InstanceGroup,
    Placement,
    RouterSettings,
    SchedulerSettings,
    SchedulingMode,
)
from disagg.base.errors import ConfigurationError
from disagg.base.request import Role
from disagg.costs.platform import Platform
from disagg.measure.open_loop import OpenLoop
from disagg.measure.slo import SloTarget
from disagg.measure.statistics import Estimate
from disagg.placement.bounds import FULL_PREFILL, decode_shape, prefill_shape
from disagg.placement.goodput_job import GoodputJob, JobResult, run_goodput_job
from disagg.placement.problem import LengthSample
from disagg.placement.progress import OnProgress, PlanProgress
from disagg.placement.workers import Workers
from disagg.simulator.cluster import ClusterSpec
from disagg.simulator.engines import build_cluster, own_rules

BUDGETS: Final = (128, 256, 512, 1024, 2048)
"""Tokens of a step that are tried, as far as the profile measured steps so large."""
_ROUNDS: Final = ((0.2, 1, 8), (0.6, 1, 4), (1.0, 3, 4))
"""Part of the requests of a run, seeds, and how many placements remain after it."""
_FEWEST_REQUESTS: Final = 20
"""With fewer, one late request in ten is less than one."""
_COARSE: Final = 0.1
_BATCH: Final = 8


@dataclass(frozen=True, kw_only=True)
class HostProblem:
    """A profiled model on ``num_cores`` cores, under a workload, held to a target.

    ``platforms`` are by the threads of an instance. ``most_tokens`` is the largest step that was measured.
    """

    platforms: Mapping[int, Platform]
    num_cores: int
    most_tokens: int
    cache: CacheSettings
    workload: OpenLoop
    target: SloTarget
    num_requests: int = 300
    """Of a run, in the last round."""
    num_seeds: int = 3
    lends_cores: bool = True
    """Instances without a step lend theirs to their neighbours' steps, in every placement that is tried."""
    notes: tuple[str, ...] = ()
    """What the platforms do not know, for people."""
    sample: LengthSample = field(init=False)

    def __post_init__(self) -> None:
        if min(self.platforms) > self.num_cores:
            raise ConfigurationError(
                f"the profile is of {min(self.platforms)} threads and there are {self.num_cores} cores: give more"
            )
        object.__setattr__(self, "sample", LengthSample.of(self.workload))


@dataclass(frozen=True)
class HostPlacement:
    """Instances of ``num_threads`` each."""

    placement: Placement
    num_threads: int

    @property
    def num_cores(self) -> int:
        """Cores of all instances."""
        return sum(group.count for group in self.placement.groups) * self.num_threads

    def __str__(self) -> str:
        threads = "1 thread" if self.num_threads == 1 else f"{self.num_threads} threads"
        return " + ".join(_words(group) for group in self.placement.groups) + f", {threads} each"


@dataclass(frozen=True)
class JudgedHostPlacement:
    """A placement with its goodput, and the searches of each seed."""

    candidate: HostPlacement
    goodput: Estimate
    results: tuple[JobResult, ...]


def platforms_on(platform: Platform, num_cores: int) -> dict[int, Platform]:
    """Return the platforms of a plan for so many cores: of each power of two of threads, and of all cores.

    Fewer threads than those of ``platform``, the fewest that were measured, are left out.
    """
    fewest = platform.num_threads or 1
    wanted = {fewest, num_cores, *(2**power for power in range(num_cores.bit_length()))}
    return {number: platform.at_threads(number) for number in sorted(wanted) if number >= fewest}


def host_placements(problem: HostProblem) -> list[HostPlacement]:
    """Return every placement that is tried: all roles, threads, modes and budgets for as many cores as there are."""
    found = []
    budgets = [tokens for tokens in BUDGETS if tokens <= problem.most_tokens] or [problem.most_tokens]
    for num_threads in sorted(problem.platforms):
        most = problem.num_cores // num_threads
        for count in range(1, most + 1):
            groups = [*_colocated(count, num_threads, budgets), *_disaggregated(count, num_threads, budgets)]
            lends = problem.lends_cores if count > 1 else None
            found += [HostPlacement(Placement(groups=tuple(one), lend_cores=lends), num_threads) for one in groups]
    return found


def _colocated(count: int, num_threads: int, budgets: Sequence[int]) -> Iterator[list[InstanceGroup]]:
    for mode, tokens in product(SchedulingMode, budgets):
        # The others take whole prompts whatever the budget, or size their chunks themselves.
        if mode is not SchedulingMode.CHUNKED and tokens != budgets[-1]:
            continue
        yield [
            InstanceGroup(
                role=Role.COLOCATED, count=count, num_threads=num_threads, scheduling=mode, max_batch_tokens=tokens
            )
        ]


def _disaggregated(count: int, num_threads: int, budgets: Sequence[int]) -> Iterator[list[InstanceGroup]]:
    for num_prefill, tokens in product(range(1, count), budgets):
        prefill = InstanceGroup(role=Role.PREFILL, count=num_prefill, num_threads=num_threads, max_batch_tokens=tokens)
        yield [prefill, InstanceGroup(role=Role.DECODE, count=count - num_prefill, num_threads=num_threads)]


def search_host(
    problem: HostProblem, workers: Workers, on_progress: OnProgress
) -> tuple[list[JudgedHostPlacement], bool]:
    """Return the best placements, best first, and whether the search ended by itself: Ctrl-C gives what is known.

    Raises ConfigurationError when no placement keeps the target at any rate that was tried.
    """
    candidates = host_placements(problem)
    judged: list[JudgedHostPlacement] = []
    starts: dict[HostPlacement, float] = {}
    is_complete = True
    total = _num_searches(problem, len(candidates))
    done = 0
    try:
        for part, seeds, kept in _ROUNDS:
            num_requests = max(_FEWEST_REQUESTS, round(part * problem.num_requests))
            num_seeds = min(seeds, problem.num_seeds)
            keys = [(one, seed) for one in candidates for seed in range(num_seeds)]
            jobs = [_job(problem, one, starts.get(one), num_requests, seed) for one, seed in keys]
            results: dict[HostPlacement, list[JobResult]] = {}
            for (one, _), result in zip(keys, workers.map(run_goodput_job, jobs), strict=True):
                results.setdefault(one, []).append(result)
                done += 1
                best = str(judged[0].candidate) if judged else str(one)
                on_progress(PlanProgress(done, total, best))
            # Those that were left behind stay behind, in the order in which they were.
            judged = _judged(results) + [one for one in judged if one.candidate not in results]
            candidates = [one.candidate for one in judged[:kept] if one.goodput.mean > 0]
            starts = {one.candidate: one.goodput.mean for one in judged}
    except KeyboardInterrupt:
        if not judged:
            raise
        is_complete = False
    if not judged or judged[0].goodput.mean <= 0:
        raise ConfigurationError(
            f"no placement on {problem.num_cores} core(s) keeps {problem.target} at any rate that was tried: loosen "
            "the objectives"
        )
    return [one for one in judged if one.goodput.mean > 0], is_complete


def cluster_of_host(problem: HostProblem, candidate: HostPlacement, *, strict_roles: bool | None = None) -> ClusterSpec:
    """Return the simulated deployment; objectives make leanings of roles unless ``strict_roles`` says otherwise."""
    scheduler = SchedulerSettings(objectives=problem.target.slo.objectives())
    rules = own_rules(scheduler, problem.cache, RouterSettings(strict_roles=strict_roles))
    platform = problem.platforms[candidate.num_threads]
    lent_cores = problem.num_cores if candidate.placement.lend_cores else None
    return build_cluster(candidate.placement, platform, rules, lent_cores=lent_cores)


def _num_searches(problem: HostProblem, num_candidates: int) -> int:
    total = 0
    for _, seeds, kept in _ROUNDS:
        total += num_candidates * min(seeds, problem.num_seeds)
        num_candidates = min(num_candidates, kept)
    return total


def _job(
    problem: HostProblem, candidate: HostPlacement, start_rate: float | None, num_requests: int, seed: int
) -> GoodputJob:
    spec = cluster_of_host(problem, candidate)
    return GoodputJob(
        spec=spec,
        workload=problem.workload,
        target=problem.target,
        start_rate=start_rate or _first_rate(problem, spec),
        seed=seed,
        min_requests=num_requests,
        max_requests=num_requests,
        requests_per_rate=0.0,
        tolerance=_COARSE if start_rate is None else GoodputJob.tolerance,
        most_rate=sustained_rate(problem, spec),
    )


def _first_rate(problem: HostProblem, spec: ClusterSpec) -> float:
    """Return the rate of which the computing takes half the time of all instances."""
    return _computed_rate(problem.sample, spec, num_prompts=1, batch=_BATCH) / 2


def sustained_rate(problem: HostProblem, spec: ClusterSpec) -> float:
    """Return the rate of which the computing takes all the time of all instances, in full steps.

    Where a TTFT objective is longer than a run, the run alone would let any rate pass. Prompts that share a prefix are
    not all computed: infinite, as how much of them is found depends on the placement.
    """
    sample = problem.sample
    if problem.cache.prefix_caching and sample.shares_prefixes:
        return math.inf
    num_prompts = max(1.0, FULL_PREFILL / sample.mean_prompt)
    return _computed_rate(sample, spec, num_prompts=num_prompts, batch=spec.instances[0].scheduler.max_batch_size)


def _computed_rate(sample: LengthSample, spec: ClusterSpec, *, num_prompts: float, batch: int) -> float:
    latency = spec.instances[0].latency
    prefill_s = sum(latency.stage_times_s(prefill_shape(num_prompts, sample))) / num_prompts
    token_s = sum(latency.stage_times_s(decode_shape(batch, sample.mean_held))) / batch
    return len(spec.instances) / (prefill_s + token_s * sample.mean_output)


def _judged(results: Mapping[HostPlacement, Sequence[JobResult]]) -> list[JudgedHostPlacement]:
    judged = [
        JudgedHostPlacement(one, Estimate.of([result.rate for result in found]), tuple(found))
        for one, found in results.items()
    ]
    return sorted(judged, key=lambda one: (-one.goodput.mean, _median_s(one)))


def _median_s(judged: JudgedHostPlacement) -> float:
    """Return how long half of the requests take at the goodput: of those that serve as much the quickest is best."""
    reports = [result.report for result in judged.results if result.report is not None]
    return fmean(report.e2e.p50 for report in reports) if reports else math.inf


def _words(group: InstanceGroup) -> str:
    words = f"{group.count} {group.role.value}"
    if group.scheduling is not None:
        words += f" {group.scheduling.value}"
    return words if group.max_batch_tokens is None else f"{words} {group.max_batch_tokens}"
