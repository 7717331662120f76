"""Is what ``disagg plan`` chooses for this machine what a real server serves best? ``make plan-check``.

For each standard workload and its tight and loose objectives: the plan, then the goodput of the live server in every
placement that the plan puts near its first (``--near``), and of the best of each number of instances, role and mode.
The objectives are factors on what a lone request of median length takes by the profile. Prints the chosen beside the
measured best, and fails when more than one case in eight is off by more than 5%, noise aside. Noise: over which rates
the goodput of a search may lie, by the 95% intervals of the attainments, and how searches with other requests differ.
Beside each measured rate stands the one that is predicted for the very requests which the live server got.

A search of one placement takes about six runs of ``--requests`` requests, so 6 x requests / goodput seconds and each
seed again: at 0.4 requests/s and 40 requests ten minutes. Eight cases of about five placements with one seed take six
to seven hours there, ``--workloads chat --slo tight --near 0.8`` a part of one. Nothing else should run meanwhile.

``--quick`` is a look in ten minutes: a quick profile, tight objectives alone (at loose ones 25 s are over before a
queue is felt), one workload after the other while ``--minutes`` last. Of each, runs of 25 s about the predicted rate:
of the plan's first, of the best with other instances, then, while its part of the time lasts, of the others. Its noise
is large, and told.
"""

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Final

import msgspec
from rich.console import Console
from rich.table import Table

from disagg.base.config import CacheSettings
from disagg.bench.client.goodput import GoodputFound, GoodputPlan, find_goodput
from disagg.bench.client.load_plan import Asking, LoadPlan, OpenLoad, Server
from disagg.bench.client.prompt_source import load_prompt_source
from disagg.bench.client.run_load import run_load
from disagg.bench.compare.server_process import running, serve_command, terminable
from disagg.cli.placement_file import write_placement
from disagg.costs.latency import StepShape
from disagg.costs.platform import Platform
from disagg.costs.profile import load_profile
from disagg.costs.profiled_platform import ProfiledPlatform
from disagg.measure.slo import Slo, SloTarget
from disagg.measure.standard import STANDARD_WORKLOADS, SloKind, slo_from_unloaded, standard_workload
from disagg.measure.windows import with_requests
from disagg.placement.bounds import decode_shape
from disagg.placement.goodput_job import GoodputJob, run_goodput_job
from disagg.placement.host_planner import (
    HostProblem,
    JudgedHostPlacement,
    cluster_of_host,
    platforms_on,
    search_host,
)
from disagg.placement.problem import LengthSample
from disagg.placement.workers import open_workers

WITHIN: Final = 0.05
TOLERANCE: Final = 0.05
GROWTH: Final = 1.2
SETTLE_S: Final = 3.0
DRAIN_S: Final = 120.0
QUICK_MINUTES: Final = 10.0
QUICK_RUN_S: Final = 25.0
QUICK_TOLERANCE: Final = 0.2
QUICK_PLAN: Final = 120
QUICK_WORKLOADS: Final = ("chat", "reason", "summarise", "code")
"""The most telling first."""
QUICK_PLACEMENTS: Final = 2
"""Of a workload, before the next one."""
QUICK_SEARCH_S: Final = 100.0
"""Which a search is thought to take before one has been made."""
FEWEST_REQUESTS: Final = 12
UNSEEN: Final = 1000
"""First seed of the live requests: the plan draws others."""


class Searched(msgspec.Struct, frozen=True):
    """What one live search found: the highest rate that met, and the range in which the goodput may lie.

    ``middle`` is half way from that rate to the lowest that missed.
    """

    rate: float
    middle: float
    low: float
    high: float

    @classmethod
    def of(cls, found: GoodputFound, attainment: float) -> "Searched":
        """Return it: rates of whole runs whose attainment may be the target's, by its interval, are in the range."""
        rate = found.bracket.met
        may_be = [
            trial.rate
            for trial in found.trials
            if not trial.is_cut and trial.attainment.low <= attainment <= trial.attainment.high
        ]
        missed = [found.bracket.missed] if math.isfinite(found.bracket.missed) else []
        return cls(rate, fmean([rate, *missed]), min([rate, *may_be]), max([rate, *may_be, *missed]))


class Measured(msgspec.Struct, frozen=True):
    """One placement in one case: goodput by the plan, and by live searches with other requests each.

    ``predicted`` is the mean of what is simulated for those requests.
    """

    words: str
    planned: float
    predicted: float
    measured: tuple[Searched, ...]

    @property
    def ratio(self) -> float:
        """The predicted goodput over the measured one, which lies between what was met and what was missed."""
        middle = fmean(one.middle for one in self.measured)
        return self.predicted / middle if middle else math.inf

    @property
    def goodput(self) -> float:
        """The median of the searches."""
        return median(one.rate for one in self.measured)

    @property
    def uncertainty(self) -> float:
        """Half the range in which the goodput lies, in requests/s: more searches narrow it."""
        half_s = sum(one.high - one.low for one in self.measured) / 2 / len(self.measured) ** 1.5
        rates = [one.rate for one in self.measured]
        return max(half_s, (max(rates) - min(rates)) / 2)


class CheckedCase(msgspec.Struct, frozen=True):
    """A workload under objectives. The first placement is the plan's."""

    workload: str
    kind: str
    slo: str
    placements: tuple[Measured, ...]

    @property
    def best(self) -> Measured:
        """The placement that served the most."""
        return max(self.placements, key=lambda one: one.goodput)

    @property
    def shortfall(self) -> float:
        """What the chosen placement lacks of the best one's goodput."""
        return 1 - self.placements[0].goodput / self.best.goodput if self.best.goodput else 0.0

    @property
    def noise(self) -> float:
        """How uncertain the difference of the chosen and of the best placement is, as a part of the best's goodput."""
        both = [one.uncertainty for one in (self.placements[0], self.best)]
        return math.hypot(*both) / self.best.goodput if self.best.goodput else 0.0

    @property
    def verdict(self) -> str:
        """Whether the plan was right."""
        if self.shortfall <= WITHIN:
            return "yes" if len(self.placements) > 1 else "nothing beside"
        return "within noise" if self.shortfall <= self.noise else "NO"


@dataclass(frozen=True)
class Machine:
    """The profile of this machine, and what it says by the threads of an instance."""

    profile: Path
    platforms: dict[int, Platform]
    num_cores: int
    most_tokens: int
    lends_cores: bool
    """Instances lend each other their cores, planned and live: the placement file says so."""


def read_machine(profile: Path, *, lends_cores: bool) -> Machine:
    """Read the profile."""
    platform = ProfiledPlatform(load_profile(profile), CacheSettings().kv_memory_bytes)
    num_cores = len(os.sched_getaffinity(0))
    return Machine(profile, platforms_on(platform, num_cores), num_cores, platform.most_tokens, lends_cores)


def make_profile(file: Path, *, quick: bool) -> Path:
    """Measure this machine with each number of threads that a plan may use: in minutes, or ``quick`` in one or two."""
    command = ["profile", "-o", str(file), *(["--quick"] if quick else [])]
    subprocess.run([sys.executable, "-m", "disagg.cli.main", *command], check=True)
    return file


def objectives(machine: Machine, workload: str, kind: SloKind) -> Slo:
    """Return factors on what a lone request of median length takes on the narrowest instance."""
    sample = LengthSample.of(with_requests(standard_workload(workload, 1.0, 400), 400))
    latency = machine.platforms[min(machine.platforms)].latency(1, 1)
    prompt = StepShape()
    prompt.add_prefill(0, sample.prompt_quantile(0.5))
    ttft_s, tpot_s = (sum(latency.stage_times_s(shape)) for shape in (prompt, decode_shape(1, sample.mean_held)))
    return slo_from_unloaded(kind, ttft_s, tpot_s)


def host_problem(machine: Machine, workload: str, target: SloTarget, num_requests: int) -> HostProblem:
    """Return what is planned: a workload within objectives, in runs of so many requests."""
    return HostProblem(
        platforms=machine.platforms,
        num_cores=machine.num_cores,
        most_tokens=machine.most_tokens,
        cache=CacheSettings(),
        workload=standard_workload(workload, 1.0, 400),
        target=target,
        num_requests=num_requests,
        lends_cores=machine.lends_cores,
    )


def plan_case(machine: Machine, workload: str, target: SloTarget, num_requests: int) -> list[JudgedHostPlacement]:
    """Return the plan's placements, best first."""
    with open_workers() as workers:
        judged, _ = search_host(host_problem(machine, workload, target, num_requests), workers, lambda progress: None)
    return judged


def contenders(judged: Sequence[JudgedHostPlacement], near: float, *, quick: bool) -> list[JudgedHostPlacement]:
    """Return the first, and of each kind the best that the plan puts near it; ``quick``: whatever the scheduling."""
    found: dict[object, JudgedHostPlacement] = {}
    for one in judged:
        groups = tuple(
            (group.role, group.count, None if quick else group.scheduling) for group in one.candidate.placement.groups
        )
        if one.goodput.mean >= near * judged[0].goodput.mean:
            found.setdefault((one.candidate.num_threads, groups), one)
    return list(found.values())


def measure(
    machine: Machine, one: JudgedHostPlacement, workload: str, target: SloTarget, options: argparse.Namespace
) -> Measured:
    """Search the goodput of a live server in this placement, once for each seed."""
    searches, predicted = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_placement(one.candidate.placement, folder / "placement.yaml")
        arguments = ["--placement", str(folder / "placement.yaml"), "--slo", str(target.slo)]
        arguments += ["--latency", str(machine.profile)]
        for seed in range(options.seeds):
            num_requests = quick_requests(one.goodput.mean) if options.quick else options.requests
            predicted.append(predict(machine, one, workload, target, num_requests, UNSEEN + seed))
            if options.quick and quick_requests(predicted[-1]) < num_requests:  # at that rate the run would be long
                num_requests = quick_requests(predicted[-1])
                predicted[-1] = predict(machine, one, workload, target, num_requests, UNSEEN + seed)
            with running(serve_command(str(one.candidate), arguments), folder / "log") as server:
                time.sleep(SETTLE_S)
                rate = predicted[-1] or one.goodput.mean
                found = search_live(server.command.url, rate, num_requests, workload, target, options, seed)
            searches.append(Searched.of(found, target.attainment))
    return Measured(str(one.candidate), one.goodput.mean, fmean(predicted), tuple(searches))


def quick_requests(rate: float) -> int:
    """Return how many requests of a rate make a quick run."""
    return max(FEWEST_REQUESTS, round(rate * QUICK_RUN_S))


def predict(
    machine: Machine, one: JudgedHostPlacement, workload: str, target: SloTarget, num_requests: int, seed: int
) -> float:
    """Return the goodput that is predicted for the requests of a seed."""
    job = GoodputJob(
        spec=cluster_of_host(host_problem(machine, workload, target, num_requests), one.candidate),
        workload=standard_workload(workload, 1.0, num_requests),
        target=target,
        start_rate=one.goodput.mean,
        seed=seed,
        min_requests=num_requests,
        max_requests=num_requests,
        requests_per_rate=0.0,
    )
    return run_goodput_job(job).rate


def search_live(
    url: str,
    start_rate: float,
    num_requests: int,
    workload: str,
    target: SloTarget,
    options: argparse.Namespace,
    seed: int,
) -> GoodputFound:
    """Search the goodput of a running server with requests that the plan has not seen."""

    def load_at(rate: float, drawn: int) -> OpenLoad:
        return OpenLoad(tuple(standard_workload(workload, rate, num_requests).draw(drawn)))

    source = load_prompt_source()
    asked = GoodputPlan(
        plan=LoadPlan(
            server=Server(url),
            load=load_at(start_rate, UNSEEN + seed),
            asking=Asking(temperature=0.0),
            num_warmup=2,
        ),
        load_at=load_at,
        start_rate=start_rate,
        target=target,
        seeds=(UNSEEN + seed,),
        tolerance=QUICK_TOLERANCE if options.quick else TOLERANCE,
        drain_s=QUICK_RUN_S if options.quick else DRAIN_S,
        growth=GROWTH,
        max_doublings=4 if options.quick else 8,
        num_unloaded=3 if options.quick else 8,
    )
    return find_goodput(asked, lambda plan, what: run_load(plan, source))


def cases(options: argparse.Namespace, machine: Machine, console: Console) -> Iterator[CheckedCase]:
    """Yield each workload under each pair of objectives, measured. Each case has an equal part of the minutes left."""
    ends_s = options.begin_s + 60 * options.minutes
    asked = [(workload, kind) for kind in map(SloKind, options.slo) for workload in options.workloads]
    took_s: list[float] = []
    plan_s = 0.0
    for number, (workload, kind) in enumerate(asked):
        begin_s = time.monotonic()
        if begin_s + plan_s + max(took_s, default=QUICK_SEARCH_S) > ends_s:
            console.print(f"no time for {len(asked) - number} more case(s): give more --minutes")
            return
        until_s = begin_s + (ends_s - begin_s) / (len(asked) - number)
        target = SloTarget(slo=objectives(machine, workload, kind))
        judged = plan_case(machine, workload, target, options.plan_requests)
        plan_s = max(plan_s, time.monotonic() - begin_s)
        chosen = contenders(judged, options.near, quick=options.quick)
        console.print(
            f"case {number + 1} of {len(asked)}: {workload}, {kind.value} ({target}), {len(chosen)} placements near "
            f"{judged[0].candidate}; {_minutes(time.monotonic() - options.begin_s)} passed"
        )
        measured: list[Measured] = []
        for one in chosen:
            now_s = time.monotonic()
            may_end_s = ends_s if len(measured) < QUICK_PLACEMENTS else until_s
            if measured and now_s + max(took_s) > may_end_s:
                console.print(f"  no time for {len(chosen) - len(measured)} more")
                break
            measured.append(measure(machine, one, workload, target, options))
            took_s.append(time.monotonic() - now_s)
            print_measured(measured[-1], console)
        yield CheckedCase(workload, kind.value, str(target.slo), tuple(measured))


def print_measured(one: Measured, console: Console) -> None:
    """Print one placement as soon as it is known."""
    told = ", ".join(f"{found.rate:.3g} ({found.low:.3g} to {found.high:.3g})" for found in one.measured)
    console.print(
        f"  {one.words}: planned {one.planned:.3g}, predicted for these requests {one.predicted:.3g}, measured {told} "
        f"requests/s; predicted / measured {one.ratio:.2f}"
    )


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min"


def table(checked: Sequence[CheckedCase]) -> Table:
    """Return the chosen beside the measured best."""
    drawn = Table(title="goodput of the live server, requests/s")
    for heading in (
        "workload",
        "objectives",
        "chosen",
        "planned",
        "predicted",
        "measured",
        "ratio",
        "measured best",
        "its",
        "short",
        "agrees",
    ):
        drawn.add_column(heading, overflow="fold")
    for case in checked:
        first, best = case.placements[0], case.best
        drawn.add_row(
            case.workload,
            f"{case.kind}: {case.slo}",
            first.words,
            f"{first.planned:.3g}",
            f"{first.predicted:.3g}",
            f"{first.goodput:.3g}",
            f"{first.ratio:.2f}",
            best.words,
            f"{best.goodput:.3g}",
            f"{case.shortfall:.0%} (noise {case.noise:.0%})",
            case.verdict,
        )
    return drawn


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", type=Path, help="of this machine; measured when missing")
    parser.add_argument("--workloads", nargs="+", choices=STANDARD_WORKLOADS)
    kinds = [kind.value for kind in SloKind]
    parser.add_argument("--slo", nargs="+", choices=kinds)
    parser.add_argument("--requests", type=int, default=40, help="of each run")
    parser.add_argument("--plan-requests", type=int, help="of each simulated run")
    parser.add_argument("--quick", action="store_true", help="a look in ten minutes")
    parser.add_argument("--minutes", type=float, help="start no further search that would end later")
    parser.add_argument("--seeds", type=int, default=1, help="searches of each placement, with other requests each")
    parser.add_argument("--near", type=float, default=0.7, help="measure what the plan puts at this part of its first")
    parser.add_argument("--no-lend-cores", action="store_true", help="instances keep their cores to themselves")
    parser.add_argument("--json", action="store_true", help="print one line of JSON for each case")
    options = parser.parse_args()
    options.begin_s = time.monotonic()
    options.slo = options.slo or ([SloKind.TIGHT.value] if options.quick else [kind.value for kind in SloKind])
    options.workloads = options.workloads or list(QUICK_WORKLOADS if options.quick else STANDARD_WORKLOADS)
    options.plan_requests = options.plan_requests or (QUICK_PLAN if options.quick else HostProblem.num_requests)
    options.minutes = options.minutes or (QUICK_MINUTES if options.quick else math.inf)
    return options


def main() -> int:
    """Check and print; return the exit status."""
    options = parse()
    console = Console(stderr=True)
    with terminable(), tempfile.TemporaryDirectory() as folder:
        profile = options.profile or make_profile(Path(folder) / "profile.json", quick=options.quick)
        machine = read_machine(profile, lends_cores=not options.no_lend_cores)
        checked = list(cases(options, machine, console))
    if options.json:
        for case in checked:
            print(msgspec.json.encode(case).decode())
    else:
        Console(width=220).print(table(checked))
    wrong = sum(case.verdict == "NO" for case in checked)
    return 0 if wrong * 8 <= len(checked) else 1


if __name__ == "__main__":
    sys.exit(main())
