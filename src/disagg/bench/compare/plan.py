"""From a comparison's cases to the runs that every system gets: the same requests, the same texts."""

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from disagg.base.errors import ConfigurationError
from disagg.bench.client.load_plan import ClosedLoad, Limits, LoadPlan, OpenLoad, Server
from disagg.bench.compare.spec import (
    DERIVED_SLOS,
    Case,
    ClosedLoopCase,
    ComparisonSpec,
    OpenLoopCase,
    SingleStreamCase,
    case_words,
)
from disagg.bench.report.runs import Load
from disagg.measure.arrivals import ArrivalKind, Arrivals
from disagg.measure.open_loop import FixedLengths, OpenLoop
from disagg.measure.slo import Slo, parse_slo
from disagg.measure.standard import SloKind, slo_from_unloaded, standard_workload
from disagg.measure.trace import Trace
from disagg.measure.workload import RequestSpec

_TRACE_ENDINGS: Final = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz")
_ANY_RATE: Final = 1.0
"""Of a closed loop, whose requests have no times."""
_MANY_RUNS: Final = 10_000
"""More than one server ever gets."""
UNLOADED_REQUESTS: Final = 5
UNLOADED_OUTPUT_LEN: Final = 32


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """One run of any system: requests, and how they are sent."""

    workload: str
    load: Load
    requests: tuple[RequestSpec, ...]
    slo: tuple[str, ...]
    prompt_seed: int = 0
    """No two runs of one server have a text in common, for the sake of prefix caches; those of one number have all."""

    def load_plan(self, server: Server, spec: ComparisonSpec) -> LoadPlan:
        """Return what the load client is to do."""
        requests, num_users = self.requests, self.load.num_users
        return LoadPlan(
            server=server,
            load=OpenLoad(requests) if self.load.is_open_loop else ClosedLoad(requests, num_users),
            prompt_seed=self.prompt_seed,
            limits=Limits(request_timeout_s=spec.request_timeout_s, deadline_s=spec.longest_run_s),
        )


def plan_runs(spec: ComparisonSpec, seed: int) -> list[PlannedRun]:
    """Return all runs in the order of the cases. Raises ConfigurationError for a workload that there is not."""
    runs = [run for case in spec.cases for run in _runs(case, seed)]
    return [replace(run, prompt_seed=seed * _MANY_RUNS + number) for number, run in enumerate(runs, start=1)]


def unloaded_run(run: PlannedRun) -> PlannedRun:
    """Return the run that shows what a request of ``run``'s median prompt takes on an idle server."""
    prompt_len = round(statistics.median(request.prompt_len for request in run.requests))
    request = RequestSpec(prompt_len=prompt_len, output_len=UNLOADED_OUTPUT_LEN)
    load = Load(num_users=1, prompt_len=prompt_len)
    return PlannedRun(run.workload, load, (request,) * UNLOADED_REQUESTS, (), -run.prompt_seed)


def needs_unloaded(run: PlannedRun) -> bool:
    """Return whether objectives are derived from the unloaded latencies."""
    return any(text in DERIVED_SLOS for text in run.slo)


def objectives_of(run: PlannedRun, unloaded: tuple[float, float]) -> list[tuple[str, Slo]]:
    """Return the objectives of a run and, where there are several, what to call its workload under each.

    ``unloaded`` are TTFT and TPOT in seconds of a single request of the median prompt; unused unless derived.
    """
    found = []
    for text in run.slo:
        derived = text in DERIVED_SLOS
        slo = slo_from_unloaded(SloKind(text), *unloaded) if derived else parse_slo(text)
        words = f"{text} objectives" if derived else text
        found.append((f"{run.workload}, {words}" if derived or len(run.slo) > 1 else run.workload, slo))
    return found or [(run.workload, Slo())]


def _runs(case: Case, seed: int) -> Iterator[PlannedRun]:
    words = case_words(case)
    match case:
        case OpenLoopCase():
            for rate in case.rates:
                yield PlannedRun(words, Load(rate=rate), _requests(case, rate, seed), case.slo)
        case ClosedLoopCase():
            for num_users in case.users:
                yield PlannedRun(words, Load(num_users=num_users), _requests(case, _ANY_RATE, seed), case.slo)
        case SingleStreamCase():
            for prompt_len in case.prompt_lens:
                request = RequestSpec(prompt_len=prompt_len, output_len=case.output_len)
                yield PlannedRun(words, Load(num_users=1, prompt_len=prompt_len), (request,) * case.requests, case.slo)


def _requests(case: OpenLoopCase | ClosedLoopCase, rate: float, seed: int) -> tuple[RequestSpec, ...]:
    return tuple(_workload(case, rate).draw(seed))


def _workload(case: OpenLoopCase | ClosedLoopCase, rate: float) -> OpenLoop:
    if case.workload is None:
        assert case.prompt_len is not None, "checked by the spec"
        assert case.output_len is not None, "checked by the spec"
        source = FixedLengths(case.prompt_len, case.output_len, case.requests)
        workload = OpenLoop(source, Arrivals(ArrivalKind.POISSON, rate))
    elif case.workload.endswith(_TRACE_ENDINGS):
        trace = Trace(Path(case.workload), case.requests)
        workload = OpenLoop(trace, Arrivals(ArrivalKind.REPLAY if trace.has_times else ArrivalKind.POISSON, rate))
    else:
        workload = standard_workload(case.workload, rate, case.requests, Path(case.traces) if case.traces else None)
    return _cut(workload, case)


def _cut(workload: OpenLoop, case: OpenLoopCase | ClosedLoopCase) -> OpenLoop:
    if case.shorten is not None:
        workload = replace(workload, length_factor=case.shorten)
    if case.max_total_len is not None:
        workload = replace(workload, limits=replace(workload.limits, max_total_len=case.max_total_len))
    return workload


def median_latencies(ttft_s: float, tpot_s: float, workload: str) -> tuple[float, float]:
    """Return both, or raise ConfigurationError when there are none to derive objectives from."""
    if math.isnan(ttft_s) or math.isnan(tpot_s):
        raise ConfigurationError(
            f"no single request of {workload} was answered token by token, so that no objectives can be derived: see "
            "the first system's log, or give them as ttft=..,tpot=.."
        )
    return ttft_s, tpot_s
