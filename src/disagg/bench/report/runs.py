"""What a report is made of: runs of load clients, grouped by system, workload and load."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import msgspec

from disagg.measure.machine import Machine
from disagg.measure.record import Ending, RequestRecord
from disagg.measure.slo import Slo
from disagg.measure.statistics import Estimate, Percentiles, Share
from disagg.measure.summary import RunSummary, summarize

MAX_OTHER_CORES = 0.1
"""Above this share of a core by others, a run counts as disturbed."""
MIN_RUNS_FOR_SPREAD = 3
"""From so many runs on, an interval of attainment also takes in how the runs differ."""


class Load(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How hard a system is driven: ``rate`` in requests/s (an open loop), or ``num_users`` at once (a closed loop)."""

    rate: float = math.nan
    num_users: int = 0
    prompt_len: int = 0
    """Tokens of every prompt, where that is in what the loads of a workload differ."""

    @property
    def is_open_loop(self) -> bool:
        """True when requests come whatever becomes of those before them."""
        return self.num_users == 0

    def __str__(self) -> str:
        if self.is_open_loop:
            return f"{self.rate:.3g} request{'s' * (self.rate != 1)}/s"
        if self.prompt_len:
            return f"{self.prompt_len} prompt tokens"
        return "one request at a time" if self.num_users == 1 else f"{self.num_users} users"


@dataclass(frozen=True)
class SystemRun:
    """One run of one system. Equal seeds of equal workloads and loads mean equal requests."""

    system: str
    workload: str
    load: Load
    seed: int
    num_devices: int
    slo: Slo
    records: tuple[RequestRecord, ...]
    settings: dict[str, str]
    """What was set, for people: command line, model, placement."""
    machine: Machine | None = None
    client_cores: float = math.nan
    """CPU time of the load client over the run's time: 1 is one core kept busy."""
    other_cores: float = math.nan
    """The same of everything that is neither client nor server."""
    notes: tuple[str, ...] = ()
    """What a reader should know, such as why the run was ended early."""

    @property
    def is_disturbed(self) -> bool:
        """True when something else used the machine, so that the figures may not be the system's."""
        return self.other_cores > MAX_OTHER_CORES

    @cached_property
    def summary(self) -> RunSummary:
        """Latencies, attainment and throughput."""
        return summarize(self.records, self.slo, is_open_loop=self.load.is_open_loop)

    @property
    def finished(self) -> list[RequestRecord]:
        """The requests that ended well."""
        return [record for record in self.records if record.ending is Ending.FINISHED]


@dataclass(frozen=True)
class Interval:
    """A share with its 95% interval."""

    share: float
    low: float
    high: float


@dataclass(frozen=True)
class RunGroup:
    """The runs of one system under one load of one workload: repeats, or other seeds. Never empty."""

    runs: tuple[SystemRun, ...]

    @property
    def system(self) -> str:
        """Its name."""
        return self.runs[0].system

    @property
    def load(self) -> Load:
        """How hard it was driven."""
        return self.runs[0].load

    @property
    def slo(self) -> Slo:
        """The objectives."""
        return self.runs[0].slo

    @property
    def num_devices(self) -> int:
        """Devices of the system."""
        return self.runs[0].num_devices

    @cached_property
    def finished(self) -> list[RequestRecord]:
        """The requests of all runs that ended well."""
        return list(chain.from_iterable(run.finished for run in self.runs))

    @cached_property
    def ttft(self) -> Percentiles:
        """Of the requests of all runs, in seconds."""
        return Percentiles.of([record.ttft_s for record in self.finished])

    @cached_property
    def tpot(self) -> Percentiles:
        """Of the requests of all runs, in seconds."""
        return Percentiles.of([record.tpot_s for record in self.finished])

    @cached_property
    def itl(self) -> Percentiles:
        """Of the gaps of all runs, in seconds."""
        return Percentiles.of(list(chain.from_iterable(record.gaps_s for record in self.finished)))

    @cached_property
    def lateness(self) -> Percentiles:
        """How late the client sent, in seconds."""
        return Percentiles.of([record.lateness_s for run in self.runs for record in run.records])

    @cached_property
    def errors(self) -> dict[str, int]:
        """How many requests did not end well, by kind."""
        counts: dict[str, int] = {}
        for run in self.runs:
            for kind, count in run.summary.errors.items():
                counts[kind] = counts.get(kind, 0) + count
        return counts

    def attainment(self, factor: float = 1.0) -> Interval:
        """Return the share of all requests that keep the objectives loosened by ``factor``."""
        slo = self.slo if factor == 1.0 else self.slo.scaled(factor)
        shares = [Share.that(record.meets(slo) for record in run.records) for run in self.runs]
        return pool_shares(shares)

    def mean(self, value: Callable[[RunSummary], float]) -> float:
        """Return the mean over runs of something in their summaries."""
        return sum(value(run.summary) for run in self.runs) / len(self.runs)

    def mean_stages(self) -> dict[str, float]:
        """Return the mean seconds that a finished request spent in each stage.

        Where the server tells none, what the client sees: until the first token, and after it.
        """
        told = [record for record in self.finished if record.stages]
        if told:
            names = dict.fromkeys(chain.from_iterable(record.stages for record in told))
            return {name: sum(record.stages.get(name, 0.0) for record in told) / len(told) for name in names}
        seen = [record for record in self.finished if record.event_s]
        if not seen:
            return {}
        return {
            "until_first_token": sum(record.ttft_s for record in seen) / len(seen),
            "after_first_token": sum(record.e2e_s - record.ttft_s for record in seen) / len(seen),
        }


@dataclass(frozen=True)
class GoodputResult:
    """What a goodput search found: the highest rate, in requests/s, that keeps the share ``target``."""

    system: str
    workload: str
    num_devices: int
    target: float
    rate: Estimate

    @property
    def per_device(self) -> float:
        """Requests/s for each device: the goodput."""
        return self.rate.mean / self.num_devices


def pool_shares(shares: Sequence[Share]) -> Interval:
    """Return the share over all runs with Wilson's interval; from three runs on, with that of their spread if wider."""
    pooled = Share.of(sum(share.count for share in shares), sum(share.total for share in shares))
    if len(shares) < MIN_RUNS_FOR_SPREAD:
        return Interval(pooled.share, pooled.low, pooled.high)
    half = Estimate.of([share.share for share in shares]).half_width
    low, high = min(pooled.low, pooled.share - half), max(pooled.high, pooled.share + half)
    return Interval(pooled.share, max(0.0, low), min(1.0, high))


def group_runs(runs: Iterable[SystemRun]) -> list[RunGroup]:
    """Return the runs of equal system and load together, in the order in which they first come."""
    groups: dict[tuple[str, str], list[SystemRun]] = {}
    for run in runs:
        groups.setdefault((run.system, str(run.load)), []).append(run)
    return [RunGroup(tuple(members)) for members in groups.values()]


def systems_of(runs: Iterable[SystemRun]) -> list[str]:
    """Return the names of the systems in order; the first one is what the others are compared with."""
    return list(dict.fromkeys(run.system for run in runs))
