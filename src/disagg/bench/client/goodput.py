"""The goodput of a running server: load runs at rates that close in on it, and the two curves that go with it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from disagg.bench.client.load_plan import ClosedLoad, Load, LoadPlan, OpenLoad, SessionLoad
from disagg.bench.client.run_load import LoadResult
from disagg.bench.client.running import INTERRUPTED
from disagg.bench.client.stopping import most_misses
from disagg.measure.goodput_search import RateBracket, bracket_goodput
from disagg.measure.record import RequestRecord
from disagg.measure.slo import Slo, SloTarget
from disagg.measure.statistics import Share
from disagg.measure.summary import latency_percentiles

SLO_SCALES: Final = (0.25, 0.35, 0.5, 0.7, 0.85, 1.0, 1.2, 1.4, 2.0, 2.8, 4.0)
"""Factors on both objectives at which attainment is told (DistServe, section 6.2: smaller is harder)."""
_NUM_UNLOADED: Final = 8
"""Requests sent one at a time, after the first rate that missed: should they miss too, no rate can meet."""


@dataclass(frozen=True, slots=True)
class GoodputPlan:
    """What to search. ``plan`` is without a load: ``load_at`` gives that of a rate and a seed."""

    plan: LoadPlan
    load_at: Callable[[float, int], Load]
    start_rate: float
    target: SloTarget
    """Takes the place of what the plan's limits say of objectives."""
    seeds: Sequence[int] = (0,)
    tolerance: float = 0.05
    """The bracket is closed to this part of its lower end."""
    max_doublings: int = 8
    drain_s: float = 60.0
    """How long after a run's last request answers may take; what comes later is a miss."""
    grid: Sequence[float] = ()
    """Further rates to run, as factors on the goodput, for the curve; these are not given up early."""


@dataclass(frozen=True)
class Trial:
    """All runs at one rate. ``is_cut`` when they were given up early: then the attainment is a lower bound."""

    rate: float
    results: tuple[LoadResult, ...]
    attainment: Share
    missed: tuple[str, ...]
    """What of the target was not kept, in words."""
    is_cut: bool

    @property
    def is_met(self) -> bool:
        """Whether the target was kept."""
        return not self.missed


@dataclass(frozen=True)
class GoodputFound:
    """What a search found. ``trials`` are in the order of their rates."""

    bracket: RateBracket
    trials: tuple[Trial, ...]
    is_interrupted: bool
    is_hopeless: bool
    """The objectives are missed even by one request at a time."""

    def at(self, rate: float) -> Trial | None:
        """Return the trial at a rate; None where there was none, as at 0 or infinity."""
        return next((trial for trial in self.trials if trial.rate == rate), None)

    def attainment_by_scale(self, slo: Slo) -> dict[float, Share]:
        """Return the attainment of the runs at the goodput under objectives looser by each of ``SLO_SCALES``."""
        trial = self.at(self.bracket.met)
        if trial is None:
            return {}
        records = [record for result in trial.results for record in result.records]
        return {scale: attainment(records, slo.scaled(scale)) for scale in SLO_SCALES}


RunLoad = Callable[[LoadPlan, str], LoadResult]
"""Runs one load; the text says what it is, for whoever watches."""


class _InterruptedError(Exception):
    """Ctrl-C: the search ends with what it has."""


class _HopelessError(Exception):
    """Not even one request at a time keeps the objectives."""


@dataclass
class _Search:
    """A search under way."""

    asked: GoodputPlan
    run: RunLoad
    trials: list[Trial] = field(default_factory=list)
    has_tried_unloaded: bool = False
    num_runs: int = 0

    def meets(self, rate: float) -> bool:
        """Run at a rate, until it is certain that the target is out of reach."""
        trial = self.try_rate(rate, gives_up=True)
        if not self.has_tried_unloaded and not any(one.is_met for one in self.trials):
            self.has_tried_unloaded = True
            self._try_unloaded()
        return trial.is_met

    def _try_unloaded(self) -> None:
        """Send a few requests one at a time. Raises _HopelessError when they miss as well."""
        load = self.asked.load_at(self.asked.start_rate, self.asked.seeds[0])
        if isinstance(load, SessionLoad):
            alone: Load = SessionLoad(load.sessions[:1], num_users=1)
        else:
            alone = ClosedLoad(load.requests[:_NUM_UNLOADED], num_users=1)
        result = self.run(self._plan(alone, target=None), "one request at a time")
        if result.stopped == INTERRUPTED:
            raise _InterruptedError
        if attainment(result.records, self._slo).high < self.asked.target.attainment:
            raise _HopelessError

    def try_rate(self, rate: float, *, gives_up: bool) -> Trial:
        results: list[LoadResult] = []
        num_missed = 0
        loads = [self.asked.load_at(rate, seed) for seed in self.asked.seeds]
        num_requests = [num_requests_of(load) for load in loads]
        allowed = most_misses(self.asked.target.attainment, sum(num_requests))
        for load, seed, count in zip(loads, self.asked.seeds, num_requests, strict=True):
            if gives_up and num_missed > allowed:
                break
            # The misses that are left to this run, as the part of its own requests that has to keep the objectives.
            target = max(0.0, 1 - (allowed - num_missed) / count) if gives_up else None
            result = self.run(self._plan(load, target), f"{rate:.3g} requests/s, seed {seed}")
            results.append(result)
            num_missed += sum(not record.meets(self._slo) for record in result.records)
            if result.stopped == INTERRUPTED:
                raise _InterruptedError
        total = sum(num_requests)
        records = [record for result in results for record in result.records]
        share = Share.of(sum(record.meets(self._slo) for record in records), total)
        trial = Trial(
            rate=rate,
            results=tuple(results),
            attainment=share,
            missed=self.asked.target.missed(share.share, latency_percentiles(records)),
            is_cut=len(results) < len(loads) or any(result.stopped for result in results),
        )
        self.trials.append(trial)
        return trial

    @property
    def _slo(self) -> Slo:
        return self.asked.target.slo

    def _plan(self, load: Load, target: float | None) -> LoadPlan:
        plan = self.asked.plan
        deadline_s = math.inf
        if isinstance(load, OpenLoad):
            deadline_s = load.requests[-1].arrival_s + self.asked.drain_s
        limits = replace(plan.limits, slo=self._slo, target=target, deadline_s=deadline_s)
        self.num_runs += 1
        return replace(plan.numbered(self.num_runs - 1), load=load, limits=limits)


def find_goodput(asked: GoodputPlan, run: RunLoad) -> GoodputFound:
    """Search the highest rate at which the target is kept, then run the grid around it.

    Ctrl-C ends it with what there is, and so do objectives that not even one request at a time keeps.

    Raises what ``run`` raises.
    """
    search = _Search(asked, run)
    bracket = RateBracket(0.0, math.inf)
    is_interrupted = is_hopeless = False
    try:
        bracket = bracket_goodput(
            search.meets,
            asked.start_rate,
            tolerance=asked.tolerance,
            max_doublings=asked.max_doublings,
        )
        for factor in asked.grid if bracket.met > 0 else ():
            search.try_rate(factor * bracket.met, gives_up=False)
    except _InterruptedError:
        is_interrupted = True
        bracket = _bracket_of(search.trials)
    except _HopelessError:
        is_hopeless = True
        bracket = _bracket_of(search.trials)
    trials = tuple(sorted(search.trials, key=lambda trial: trial.rate))
    return GoodputFound(bracket, trials, is_interrupted, is_hopeless)


def _bracket_of(trials: Sequence[Trial]) -> RateBracket:
    """Return the bracket of a search that was ended before its time."""
    missed = min((trial.rate for trial in trials if not trial.is_met), default=math.inf)
    met = max((trial.rate for trial in trials if trial.is_met and trial.rate < missed), default=0.0)
    return RateBracket(met, missed)


def num_requests_of(load: Load) -> int:
    """Return how many requests a load holds."""
    match load:
        case SessionLoad(sessions=sessions):
            return sum(len(session.calls) for session in sessions)
        case _:
            return len(load.requests)


def attainment(records: Sequence[RequestRecord], slo: Slo) -> Share:
    """Return the share of all requests that finished and kept both objectives."""
    return Share.that(record.meets(slo) for record in records)
