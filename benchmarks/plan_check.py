"""Is what ``disagg plan`` chooses for this machine what a real server serves best? ``make plan-check``.

For each standard workload and its tight and loose objectives: the plan, then a race of its first against the best of
each number of instances, role and mode that it puts near the first (``--near``). The first's goodput is searched on a
live server. Each rival gets one run with the same requests and arrivals, at the rate that it keeps only if it is better
by more than 5%. A rival that keeps it is searched as well, and both are run with other requests (``--seeds``): better
with all of them, it is better; with some, that is noise. The objectives are factors on what a lone request of median
length takes by the profile. Fails when a rival is better in more than one case in eight.

A run has ``--requests`` requests, more where that is needed to last ``--run-s`` or to let a queue as long as the TTFT
objective grow, and fewer where the case's part of ``--minutes`` wants it. Where it is then over long before such a
queue, all requests come nearly at once instead, and what counts is how fast nine in ten are answered (``ByFlood``), as
long as they keep their TPOT: what loose objectives let a server sustain is what it gets done.

``--all-modes`` races the best of every kind wherever the plan puts it, and strict roles beside leanings; with
``--whole`` no run is given up early, so that attainment and latencies of all can be compared at one rate. Each case is
written to ``--save`` when it is done. Nothing else should run meanwhile. Planning comes first, and may be done before:
``--plans FILE --plan-only`` leaves the plans of a profile in a file.
"""

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
from rich.console import Console

from disagg.base.config import CacheSettings, DType, Placement
from disagg.base.errors import DisaggError
from disagg.base.request import Role
from disagg.bench.client.load_plan import Asking, Limits, LoadPlan, OpenLoad, Server
from disagg.bench.client.prompt_source import load_prompt_source
from disagg.bench.client.prompt_texts import PromptSource
from disagg.bench.client.run_load import run_load
from disagg.bench.client.running import INTERRUPTED
from disagg.bench.compare.race import ByFlood, ByRates, Heat, Race, RunHeat, served_rate
from disagg.bench.compare.server_process import running, serve_command, terminable
from disagg.cli.placement_file import write_placement
from disagg.costs.latency import StepShape
from disagg.costs.platform import Platform
from disagg.costs.profile import load_profile
from disagg.costs.profiled_platform import ProfiledPlatform
from disagg.measure.record import Ending, RequestRecord
from disagg.measure.slo import Slo, SloTarget
from disagg.measure.standard import STANDARD_WORKLOADS, SloKind, slo_from_unloaded, standard_workload
from disagg.measure.statistics import Share
from disagg.measure.summary import latency_percentiles
from disagg.measure.windows import with_requests
from disagg.placement.bounds import decode_shape
from disagg.placement.goodput_job import GoodputJob, run_goodput_job
from disagg.placement.host_planner import (
    HostPlacement,
    HostProblem,
    cluster_of_host,
    platforms_on,
    search_host,
    sustained_rate,
)
from disagg.placement.problem import LengthSample
from disagg.placement.workers import open_workers
from plan_check_report import CheckedCase, Placed, details, heat_words, summary

WITHIN: Final = 0.05
WORKLOADS: Final = ("chat", "reason", "summarise", "code")
"""The most telling first."""
SETTLE_S: Final = 3.0
START_S: Final = 15.0
"""Of a server, its rest and the first request, about."""
FEWEST_REQUESTS: Final = 20
UNSEEN: Final = 1000
"""First seed of the live requests: the plan draws others."""
FELT: Final = 5.0
"""TTFT objectives that a run should last: with even arrivals and fewer than 4.4, no rate lets one in ten wait so long.

Of twice the capacity, the queue grows by half of the time in which requests come. The plan's own runs have 300."""
FLOOD: Final = 4.0
"""Times the planned goodput."""
SEARCH_RUNS: Final = 4.0
CUT_RUN: Final = 0.6
FLOOD_RUNS: Final = 2.0
"""Whole runs that the search of the first, a rival that loses, and a first that is flooded are thought to take."""
TAIL: Final = 1.25
"""Length of a run over the time in which its requests come."""


@dataclass(frozen=True)
class Machine:
    """The profile of this machine, and what it says by the threads of an instance."""

    profile: Path
    platforms: dict[int, Platform]
    num_cores: int
    most_tokens: int
    dtype: str
    lends_cores: bool
    """Instances lend each other their cores, planned and live: the placement file says so."""


def read_machine(profile: Path, *, lends_cores: bool) -> Machine:
    """Read the profile."""
    read = load_profile(profile)
    platform = ProfiledPlatform(read, CacheSettings().kv_memory_bytes)
    num_cores = len(os.sched_getaffinity(0))
    platforms = platforms_on(platform, num_cores)
    return Machine(profile, platforms, num_cores, platform.most_tokens, read.dtype, lends_cores)


def make_profile(file: Path, dtype: str) -> Path:
    """Measure this machine with each number of threads that a plan may use, in minutes."""
    command = ["profile", "-o", str(file), "--dtype", dtype]
    subprocess.run([sys.executable, "-m", "disagg.cli.main", *command], check=True)
    return file


class Contender(msgspec.Struct, frozen=True):
    """A placement as it is served. ``rate`` is what the plan says it serves."""

    placement: Placement
    num_threads: int
    rate: float
    strict_roles: bool = False

    @property
    def on_host(self) -> HostPlacement:
        """The planner's."""
        return HostPlacement(self.placement, self.num_threads)

    def __str__(self) -> str:
        return f"{self.on_host}, strict roles" if self.strict_roles else str(self.on_host)


@dataclass(frozen=True)
class Case:
    """What is asked, before it is measured."""

    machine: Machine
    workload: str
    kind: SloKind
    target: SloTarget

    @classmethod
    def of(cls, machine: Machine, workload: str, kind: SloKind) -> "Case":
        """Objectives are factors on what a lone request of median length takes on the narrowest instance."""
        sample = LengthSample.of(with_requests(standard_workload(workload, 1.0, 400), 400))
        latency = machine.platforms[min(machine.platforms)].latency(1, 1)
        prompt = StepShape()
        prompt.add_prefill(0, sample.prompt_quantile(0.5))
        shapes = (prompt, decode_shape(1, sample.mean_held))
        ttft_s, tpot_s = (sum(latency.stage_times_s(shape)) for shape in shapes)
        return cls(machine, workload, kind, SloTarget(slo=slo_from_unloaded(kind, ttft_s, tpot_s)))

    @property
    def name(self) -> str:
        """Workload and objectives."""
        return f"{self.workload}, {self.kind.value}"

    @property
    def slo(self) -> Slo:
        """The latencies to keep."""
        return self.target.slo

    def problem(self, num_requests: int) -> HostProblem:
        """Return what is planned, in runs of so many requests."""
        return HostProblem(
            platforms=self.machine.platforms,
            num_cores=self.machine.num_cores,
            most_tokens=self.machine.most_tokens,
            cache=CacheSettings(),
            workload=standard_workload(self.workload, 1.0, 400),
            target=self.target,
            num_requests=num_requests,
            lends_cores=self.machine.lends_cores,
        )

    def plan(self, num_requests: int) -> list[Contender]:
        """Return the plan's placements, best first."""
        with open_workers() as workers:
            judged, _ = search_host(self.problem(num_requests), workers, lambda progress: None)
        return [Contender(one.candidate.placement, one.candidate.num_threads, one.goodput.mean) for one in judged]

    def predict(self, one: Contender, num_requests: int) -> float:
        """Return the goodput that is predicted for the live requests of the first seed."""
        problem = self.problem(num_requests)
        spec = cluster_of_host(problem, one.on_host, strict_roles=one.strict_roles or None)
        job = GoodputJob(
            spec=spec,
            workload=standard_workload(self.workload, 1.0, num_requests),
            target=self.target,
            start_rate=one.rate,
            seed=UNSEEN,
            min_requests=num_requests,
            max_requests=num_requests,
            requests_per_rate=0.0,
            most_rate=sustained_rate(problem, spec),
        )
        return run_goodput_job(job).rate


def contenders(planned: Sequence[Contender], near: float, *, all_modes: bool) -> list[Contender]:
    """Return the first, and of each kind the best that the plan puts near it; of ``all_modes`` wherever it is."""
    found: dict[object, Contender] = {}
    for one in planned:
        groups = tuple((group.role, group.count, group.scheduling) for group in one.placement.groups)
        if all_modes or one.rate >= near * planned[0].rate:
            found.setdefault((one.num_threads, groups), one)
    chosen = list(found.values())
    walls = [one for one in chosen if any(group.role is Role.PREFILL for group in one.placement.groups)]
    return chosen + [msgspec.structs.replace(one, strict_roles=True) for one in walls if all_modes]


@dataclass
class Live:
    """Runs requests of a case on real servers."""

    case: Case
    num_requests: int
    folder: Path
    is_whole: bool
    """No run is given up early."""
    console: Console
    longest_s: float = 0.0
    """That a rival took."""
    _source: PromptSource = field(default_factory=load_prompt_source)

    @contextmanager
    def serving(self, contenders: Sequence[Contender], number: int) -> Iterator[RunHeat]:
        """Start the server of a contender."""
        one, begin_s = contenders[number], time.monotonic()
        file = self.folder / "placement.yaml"
        write_placement(one.placement, file)
        arguments = ["--placement", str(file), "--slo", str(self.case.slo)]
        arguments += ["--latency", str(self.case.machine.profile), "--dtype", self.case.machine.dtype]
        arguments += ["--strict-roles"] if one.strict_roles else []
        self.console.print(f"  {number + 1} of {len(contenders)}: {one}")
        with running(serve_command(str(one), arguments), self.folder / "log") as server:
            time.sleep(SETTLE_S)
            yield partial(self.heat, server.command.url)
        if number:
            self.longest_s = max(self.longest_s, time.monotonic() - begin_s)

    def heat(self, url: str, rate: float, seed: int, *, deadline_s: float = math.inf, gives_up: bool = True) -> Heat:
        """Run once, and print what it told. Raises KeyboardInterrupt on Ctrl-C."""
        slo, target = self.case.slo, self.case.target
        requests = tuple(standard_workload(self.case.workload, rate, self.num_requests).draw(UNSEEN + seed))
        if gives_up:  # what comes later has missed for certain
            last_s = slo.ttft_s + max(request.output_len for request in requests) * slo.tpot_s
            deadline_s = min(deadline_s, requests[-1].arrival_s + last_s)
        limits = Limits(
            slo=slo, target=target.attainment if gives_up and not self.is_whole else None, deadline_s=deadline_s
        )
        plan = LoadPlan(Server(url), OpenLoad(requests), asking=Asking(temperature=0.0), limits=limits)
        result = run_load(plan, self._source)
        if result.stopped == INTERRUPTED:
            raise KeyboardInterrupt
        heat = heat_of(result.records, result.wall_s, rate, seed, target, is_cut=bool(result.stopped))
        self.console.print(f"    {heat_words(heat)}; {result.wall_s:.0f} s")
        for fault in result.client_faults():
            self.console.print(f"    {fault}")
        return heat


def heat_of(
    records: Sequence[RequestRecord], wall_s: float, rate: float, seed: int, target: SloTarget, *, is_cut: bool
) -> Heat:
    """Return what the records of a run tell."""
    finished = [record for record in records if record.ending is Ending.FINISHED]
    share = Share.that(record.meets(target.slo) for record in records)
    latencies = latency_percentiles(records)
    quick = Share.that(record.keeps_tpot(target.slo) for record in finished)
    return Heat(
        rate=rate,
        seed=seed,
        attainment=share,
        ttft_p90_s=latencies["ttft"].p90,
        tpot_p90_s=latencies["tpot"].p90,
        is_met=target.is_met(share.share, latencies),
        keeps_tpot=quick.share >= target.attainment,
        served_rate=served_rate([record.finished_s for record in finished], len(records), wall_s),
        is_cut=is_cut,
    )


def plan_all(options: argparse.Namespace, machine: Machine, console: Console) -> dict[str, list[Contender]]:
    """Return the placements of each case, by its name, best first: from the file of plans, where it has the case.

    Cases for which nothing can be planned are left out; the file has the reason in their place.
    """
    file: Path | None = options.plans
    known: dict[str, list[Contender] | str] = {}
    if file is not None and file.exists():
        known = msgspec.json.decode(file.read_bytes(), type=dict[str, list[Contender] | str])
    planned: dict[str, list[Contender]] = {}
    for workload, kind in asked_cases(options):
        begin_s, case = time.monotonic(), Case.of(machine, workload, kind)
        if case.name not in known:
            try:
                known[case.name] = case.plan(options.plan_requests)
            except DisaggError as error:
                known[case.name] = str(error)
            console.print(f"{case.name}: planned in {time.monotonic() - begin_s:.0f} s")
            if file is not None:
                file.write_bytes(msgspec.json.encode(known))
        if isinstance(plan := known[case.name], str):
            console.print(f"{case.name}: {plan}")
        else:
            planned[case.name] = plan
    return planned


def check(
    case: Case, planned: list[Contender], until_s: float, options: argparse.Namespace, console: Console
) -> CheckedCase:
    """Race what the plan puts near its first."""
    entered = contenders(planned, options.near, all_modes=options.all_modes)
    rate = entered[0].rate
    left_s, num_rivals = until_s - time.monotonic(), len(entered) - 1
    wanted = max(options.requests, round(rate * max(options.run_s, FELT * case.slo.ttft_s)))
    num_requests = affordable_requests(left_s, rate, SEARCH_RUNS + CUT_RUN * num_rivals, wanted)
    floods = num_requests / rate < FELT / 2 * case.slo.ttft_s
    if floods:
        wanted = max(options.requests, round(rate * options.run_s))
        num_requests = affordable_requests(left_s, rate, FLOOD_RUNS + num_rivals, wanted)
    predicted = [case.predict(one, num_requests) for one in entered]
    run_s = num_requests / rate
    console.print(
        f"{case.name} ({case.target}): {len(entered)} placements, {num_requests} requests a run ({run_s:.0f} s)"
        f"{', too short for a queue to be felt: by what is served of a flood' if floods else ''}"
    )
    with tempfile.TemporaryDirectory() as folder:
        live = Live(case, num_requests, Path(folder), options.whole, console, TAIL * run_s + START_S)
        by_rates = ByRates(start_rate=predicted[0] if 0 < predicted[0] < 2 * rate else rate, within=WITHIN)
        by_flood = ByFlood(rate=FLOOD * rate, num_requests=num_requests, within=WITHIN)
        race = Race(
            num_systems=len(entered),
            open_system=lambda number: live.serving(entered, number),
            judges=(by_flood, by_rates) if floods else (by_rates,),
            seeds=range(options.seeds),
            has_time=lambda: time.monotonic() + live.longest_s <= until_s,
            on_standing=lambda number, standing: console.print(f"  {entered[number]}: {standing.value}"),
        )
        raced = race.run()
    placed = zip(entered, predicted, raced, strict=True)
    placements = tuple(Placed(str(one), one.rate, known, entrant) for one, known, entrant in placed)
    return CheckedCase(case.workload, case.kind.value, str(case.slo), num_requests, placements)


def affordable_requests(left_s: float, rate: float, num_runs: float, wanted: int) -> int:
    """Return how many requests a run may have so that so many whole runs end in time; ``wanted`` at most."""
    run_s = left_s / num_runs - START_S
    return max(FEWEST_REQUESTS, min(wanted, int(run_s * rate / TAIL)))


def asked_cases(options: argparse.Namespace) -> list[tuple[str, SloKind]]:
    """Return the workloads under each pair of objectives, in their order."""
    return [(workload, kind) for kind in map(SloKind, options.slo) for workload in options.workloads]


def cases(
    options: argparse.Namespace, machine: Machine, planned: dict[str, list[Contender]], console: Console
) -> Iterator[CheckedCase]:
    """Yield each case that was planned, measured. Each has an equal part of the minutes left."""
    begin_s = time.monotonic()
    ends_s = begin_s + 60 * options.minutes
    asked = [Case.of(machine, *one) for one in asked_cases(options)]
    asked = [case for case in asked if case.name in planned]
    for number, case in enumerate(asked):
        now_s = time.monotonic()
        console.print(f"case {number + 1} of {len(asked)}, {(now_s - begin_s) / 60:.1f} min passed")
        if now_s >= ends_s:
            console.print(f"no time for {len(asked) - number} more case(s): give more --minutes")
            return
        until_s = now_s + (ends_s - now_s) / (len(asked) - number)
        try:
            yield check(case, planned[case.name], until_s, options, console)
        except DisaggError as error:
            console.print(f"  not measured: {error}")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", type=Path, help="of this machine; measured when missing")
    dtypes = [dtype.value for dtype in DType]
    parser.add_argument("--dtype", choices=dtypes, default=DType.BFLOAT16.value, help="of a profile that is measured")
    parser.add_argument("--workloads", nargs="+", choices=STANDARD_WORKLOADS, default=list(WORKLOADS))
    kinds = [kind.value for kind in SloKind]
    parser.add_argument("--slo", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--plans", type=Path, help="file of plans, made where it lacks the case")
    parser.add_argument("--plan-only", action="store_true", help="end when it is complete")
    parser.add_argument("--minutes", type=float, default=70.0, help="of runs, divided over the cases")
    parser.add_argument("--requests", type=int, default=30, help="of a run, at least")
    parser.add_argument("--run-s", type=float, default=35.0, help="in which requests of a run come, at least")
    parser.add_argument("--plan-requests", type=int, default=HostProblem.num_requests, help="of each simulated run")
    parser.add_argument("--seeds", type=int, default=3, help="of requests, for a rival that is better with the first")
    parser.add_argument("--near", type=float, default=0.7, help="race what the plan puts at this part of its first")
    parser.add_argument("--all-modes", action="store_true", help="race every mode, and strict roles beside leanings")
    parser.add_argument("--whole", action="store_true", help="give no run up early")
    parser.add_argument("--no-lend-cores", action="store_true", help="instances keep their cores to themselves")
    parser.add_argument("--save", type=Path, help="file that receives a line of JSON for each case when it is done")
    return parser.parse_args()


def main() -> int:
    """Check and print; return the exit status."""
    options = parse()
    console = Console(stderr=True, width=200)
    checked: list[CheckedCase] = []
    with terminable(), tempfile.TemporaryDirectory() as folder:
        profile = options.profile or make_profile(Path(folder) / "profile.json", options.dtype)
        machine = read_machine(profile, lends_cores=not options.no_lend_cores)
        planned = plan_all(options, machine, console)
        try:
            for case in [] if options.plan_only else cases(options, machine, planned, console):
                checked.append(case)
                console.print(f"  {case.verdict}")
                if options.save:
                    options.save.write_bytes(b"".join(msgspec.json.encode(one) + b"\n" for one in checked))
        except KeyboardInterrupt:
            console.print("interrupted: what follows is what was done")
    printed = Console(width=220)
    for case in checked:
        printed.print(details(case))
    printed.print(summary(checked))
    wrong = sum(case.verdict in {"NO", "serves nothing"} for case in checked)
    return 0 if wrong * 8 <= len(checked) else 1


if __name__ == "__main__":
    sys.exit(main())
