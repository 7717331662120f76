"""Does the simulator tell the truth about this machine? ``make fidelity``, or ``python benchmarks/fidelity.py``.

Profiles the machine (or takes ``--profile``), then serves the same requests twice, by ``disagg simulate``'s code and by
a real ``disagg serve``: one prefill and one decode instance, and two colocated ones; requests shaped like the Azure
traces of 2023, conversation and code, replayed from ``--traces`` where the files are; at rates under, near and over
what the simulation says is the capacity. Prints both side by side; the exit status is 1 when a pair differs by more
than 5 points of attainment, or 20% of a P90 of TTFT or TPOT. Every case is run ``--runs`` times, with other requests
(the next ones of the trace) each time, and all cases between two runs of one: what is compared are means.
Takes about an hour on an idle machine.

On a shared host, what all cores together read from memory changes within a minute, by a factor of two, and with it what
instances that decode cost each other. So it is read every two seconds of a run, and there are two predictions:
``before`` with the mean that the profile met, and ``predicted`` with what each run met. The exit status is by the
second. A run in which the machine's host took more than 1% of a core's time for others (the kernel counts it as
"steal") says nothing of the model: it is made again, and that is told.

What a prediction can be worth at a load is shown beside it: the attainment predicted if every step took 3% more time,
and 3% less.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Final

import msgspec
import psutil
from rich.console import Console
from rich.table import Table

from background import repeated
from disagg.base.config import CacheSettings, InstanceGroup, Placement
from disagg.base.request import Role
from disagg.bench.client.load_plan import Asking, Limits, LoadPlan, OpenLoad, Server
from disagg.bench.client.prompt_source import load_prompt_source
from disagg.bench.client.run_load import run_load
from disagg.bench.compare.server_process import running, serve_command, terminable
from disagg.costs.latency import LatencyModel, StepShape
from disagg.costs.profile import Profile, load_profile
from disagg.costs.profiled_platform import ProfiledPlatform
from disagg.engine.benchmark.memory_reader import MemoryReader
from disagg.measure.open_loop import OpenLoop
from disagg.measure.slo import Slo, parse_slo
from disagg.measure.standard import standard_workload
from disagg.measure.summary import summarize
from disagg.simulator.cluster import ClusterSpec
from disagg.simulator.engines import build_cluster, own_rules
from disagg.simulator.evaluate import highest_rate, run_workload
from disagg.simulator.instance_spec import InstanceSpec

PLACEMENTS = {"1 prefill + 1 decode": {Role.PREFILL: 1, Role.DECODE: 1}, "2 colocated": {Role.COLOCATED: 2}}
SLOS = {"chat": parse_slo("ttft=2s,tpot=50ms"), "code": parse_slo("ttft=10s,tpot=400ms")}
"""Objectives of each workload. Bursts of long prompts with short answers keep tighter ones at no rate worth a test."""
LOADS = {"under": 0.6, "near": 1.0, "over": 1.5}
"""Parts of the rate up to which nine requests in ten keep the objectives."""
ATTAINMENT_POINTS = 0.05
LATENCY_ERROR = 0.20
READING_S: Final = 2.0
"""Between two readings of the memory bandwidth; one takes both cores for 3 ms."""
MOST_STOLEN: Final = 0.01
MOST_RUNS: Final = 4
"""Of one load. What the last one brings counts, whatever was stolen."""
SETTLE_S: Final = 3.0
"""Between a server's being ready and its first request: its KV pool is still being touched."""
STEP_ERROR = 0.03
"""A mean error of step times that nobody can rule out: the machine itself drifts by as much."""


class Outcome(msgspec.Struct, frozen=True):
    """What became of the requests, simulated or real."""

    attainment: float
    ttft_p90_s: float
    tpot_p90_s: float


class Run(msgspec.Struct, frozen=True):
    """One run of a case on the real server."""

    outcome: Outcome
    client_cores: float
    """How much of a core the load client took: it runs on the same machine."""
    memory_gb_s: tuple[float, ...]
    """What all cores could read, time and again in the run."""
    stolen: float
    """Part of its time that the core which lost most lost to others on the machine's host."""
    num_repeated: int
    """Runs before this one, in which others took too much."""


class Pair(msgspec.Struct, frozen=True):
    """One case: means over its runs, predicted and measured."""

    placement: str
    workload: str
    slo: Slo
    load: str
    rate: float
    before: Outcome
    """Predicted with the memory bandwidth that the profile met."""
    predicted: Outcome
    """With that of the runs."""
    measured: Outcome
    runs: tuple[Run, ...]
    attainment_slower: float
    """Predicted, if all steps took longer by ``STEP_ERROR``."""
    attainment_quicker: float

    @property
    def agrees(self) -> bool:
        """True when the prediction is within the bounds."""
        return is_within(self.predicted, self.measured)


@dataclass(frozen=True)
class Case:
    """One workload at one rate on one placement, and its runs so far."""

    placement: str
    workloads: Sequence[OpenLoop]
    """One for each run."""
    load: str
    slo: Slo
    profile: Profile
    lends_cores: bool = True
    runs: list[Run] = field(default_factory=list)


@dataclass(frozen=True)
class ScaledLatency:
    """A latency model whose steps take ``factor`` times as long."""

    latency: LatencyModel
    factor: float

    @property
    def num_stages(self) -> int:
        """See ``LatencyModel``."""
        return self.latency.num_stages

    def stage_times_s(self, shape: StepShape) -> tuple[float, ...]:
        """See ``LatencyModel``."""
        return tuple(time_s * self.factor for time_s in self.latency.stage_times_s(shape))


def cluster_of(
    placement: str, profile: Profile, memory_gb_s: Sequence[float] = (), *, lends_cores: bool = True
) -> ClusterSpec:
    """Return what to simulate, with the memory bandwidth that the profile met or another."""
    groups = tuple(InstanceGroup(role=role, count=count) for role, count in PLACEMENTS[placement].items())
    readings = tuple(one * 1e9 for one in memory_gb_s)
    platform = ProfiledPlatform(profile, CacheSettings().kv_memory_bytes, readings)
    lent_cores = profile.num_cores if lends_cores else None
    return build_cluster(Placement(groups=groups), platform, own_rules(), lent_cores=lent_cores)


def scaled(cluster: ClusterSpec, factor: float) -> ClusterSpec:
    """Return the same cluster with steps that take ``factor`` times as long."""
    return replace(cluster, instances=tuple(_scaled(spec, factor) for spec in cluster.instances))


def _scaled(spec: InstanceSpec, factor: float) -> InstanceSpec:
    cores = spec.cores
    if cores is not None:
        wider = {number: ScaledLatency(latency, factor) for number, latency in cores.latencies.items()}
        cores = replace(cores, latencies=wider)
    return replace(spec, latency=ScaledLatency(spec.latency, factor), cores=cores)


def error(predicted: float, measured: float) -> float:
    """Return the relative error of a prediction."""
    return predicted / measured - 1


def mean(outcomes: Sequence[Outcome]) -> Outcome:
    """Return the mean of each figure."""
    return Outcome(*(fmean(getattr(one, name) for one in outcomes) for name in Outcome.__struct_fields__))


def is_within(predicted: Outcome, measured: Outcome) -> bool:
    """Return whether a prediction is within the bounds."""
    return (
        abs(predicted.attainment - measured.attainment) <= ATTAINMENT_POINTS
        and abs(error(predicted.ttft_p90_s, measured.ttft_p90_s)) <= LATENCY_ERROR
        and abs(error(predicted.tpot_p90_s, measured.tpot_p90_s)) <= LATENCY_ERROR
    )


def predict(clusters: Sequence[ClusterSpec], workloads: Sequence[OpenLoop], slo: Slo) -> Outcome:
    """Simulate what is sent in each run, on the cluster of that run; return the means."""
    reports = [
        run_workload(cluster, workload, slo, seed)
        for seed, (cluster, workload) in enumerate(zip(clusters, workloads, strict=True))
    ]
    return mean([Outcome(report.attainment, report.ttft.p90, report.tpot.p90) for report in reports])


@contextmanager
def memory_readings() -> Iterator[list[float]]:
    """Read in the background what all cores together get from memory, in GB/s; yields where the readings go."""
    reader = MemoryReader(sorted(os.sched_getaffinity(0)))
    readings: list[float] = []
    with repeated(lambda: readings.append(reader.bytes_per_s() / 1e9), READING_S):
        yield readings


@contextmanager
def counted_steal() -> Iterator[list[float]]:
    """Append, at the end, the part of its time that the core which lost most lost to others on the machine's host."""
    found: list[float] = []
    before, started_s = psutil.cpu_times(percpu=True), time.monotonic()
    yield found
    lasted_s = time.monotonic() - started_s
    after = psutil.cpu_times(percpu=True)
    found.append(max((then.steal - now.steal) / lasted_s for now, then in zip(before, after, strict=True)))


def measure(url: str, workload: OpenLoop, slo: Slo, seed: int) -> Run:
    """Send the same requests to a real server, until the machine's host leaves it its cores for a run."""
    for num_repeated in range(MOST_RUNS):
        run = measure_once(url, workload, slo, seed, num_repeated)
        if run.stolen <= MOST_STOLEN:
            break
    return run


def measure_once(url: str, workload: OpenLoop, slo: Slo, seed: int, num_repeated: int) -> Run:
    """Send all requests once."""
    plan = LoadPlan(
        server=Server(url),
        load=OpenLoad(tuple(workload.draw(seed))),
        asking=Asking(temperature=0.0),
        limits=Limits(slo=slo),
        num_warmup=2,
    )
    with memory_readings() as memory, counted_steal() as stolen:
        result = run_load(plan, load_prompt_source())
    summary = summarize(result.records, slo)
    outcome = Outcome(summary.attainment.share, summary.ttft.p90, summary.tpot.p90)
    return Run(outcome, result.client_cores, tuple(memory), stolen[0], num_repeated)


def cases(options: argparse.Namespace, profile: Path, name: str) -> Iterator[Case]:
    """Yield the cases of one placement, each workload from under to over its capacity."""
    loaded = load_profile(profile)
    lends_cores = not options.no_lend_cores
    clusters = [cluster_of(name, loaded, lends_cores=lends_cores)] * options.runs
    for workload_name in options.workloads:
        slo = options.slo or SLOS[workload_name]
        slices = [
            standard_workload(workload_name, 1.0, options.requests, options.traces, first=run * options.requests)
            for run in range(options.runs)
        ]

        def meets(rate: float, slices: Sequence[OpenLoop] = slices, slo: Slo = slo) -> bool:
            return predict(clusters, [one.at_rate(rate) for one in slices], slo).attainment >= 0.9

        capacity = highest_rate(meets, 1.0, f"{slo}@90%")
        for load in options.loads:
            yield Case(name, [one.at_rate(capacity * LOADS[load]) for one in slices], load, slo, loaded, lends_cores)


def compare(options: argparse.Namespace, profile: Path, console: Console) -> list[Pair]:
    """Run everything, one server for each placement and run."""
    planned = {name: list(cases(options, profile, name)) for name in options.placements}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.runs):
            for name in options.placements:
                counts = [part for role, count in PLACEMENTS[name].items() for part in (f"--{role.value}", str(count))]
                counts += ["--no-lend-cores"] if options.no_lend_cores else []
                command = serve_command(name, counts)
                with running(command, Path(folder) / "log") as server:
                    time.sleep(SETTLE_S)
                    for case in planned[name]:
                        case.runs.append(measure(server.command.url, case.workloads[seed], case.slo, seed))
                        repeated = case.runs[-1].num_repeated
                        again = f", {repeated} discarded" if repeated else ""
                        told = f"{name}, {case.workloads[seed].name}, {case.load} capacity{again}"
                        console.print(f"run {seed + 1} of {options.runs}: {told}")
    return [pair_of(case) for of_placement in planned.values() for case in of_placement]


def pair_of(case: Case) -> Pair:
    """Return what was measured beside what is predicted."""

    def cluster(memory_gb_s: Sequence[float] = ()) -> ClusterSpec:
        return cluster_of(case.placement, case.profile, memory_gb_s, lends_cores=case.lends_cores)

    then = [cluster(run.memory_gb_s) for run in case.runs]

    def predicted(clusters: Sequence[ClusterSpec]) -> Outcome:
        return predict(clusters, case.workloads, case.slo)

    return Pair(
        placement=case.placement,
        workload=case.workloads[0].name,
        slo=case.slo,
        load=case.load,
        rate=case.workloads[0].rate,
        before=predicted([cluster()] * len(then)),
        predicted=predicted(then),
        measured=mean([run.outcome for run in case.runs]),
        runs=tuple(case.runs),
        attainment_slower=predicted([scaled(one, 1 + STEP_ERROR) for one in then]).attainment,
        attainment_quicker=predicted([scaled(one, 1 - STEP_ERROR) for one in then]).attainment,
    )


def table(pairs: Sequence[Pair]) -> Table:
    """Return the comparison for people."""
    drawn = Table(title="before / predicted / measured")
    for heading in (
        "placement",
        "workload",
        "objectives",
        "requests/s",
        "attainment",
        "each run",
        "GB/s",
        "steps +3 / -3%",
        "TTFT P90 ms",
        "TPOT P90 ms",
        "agrees",
    ):
        drawn.add_column(heading, justify="left" if heading in ("placement", "workload", "objectives") else "right")
    for pair in pairs:
        before, predicted, measured = pair.before, pair.predicted, pair.measured
        drawn.add_row(
            pair.placement,
            pair.workload,
            str(pair.slo),
            f"{pair.rate:.2f} ({pair.load})",
            f"{before.attainment:.1%} / {predicted.attainment:.1%} / {measured.attainment:.1%}",
            " ".join(f"{run.outcome.attainment:.0%}" for run in pair.runs),
            " ".join(f"{fmean(run.memory_gb_s):.0f}" for run in pair.runs),
            f"{pair.attainment_slower:.0%} / {pair.attainment_quicker:.0%}",
            _milliseconds(before.ttft_p90_s, predicted.ttft_p90_s, measured.ttft_p90_s),
            _milliseconds(before.tpot_p90_s, predicted.tpot_p90_s, measured.tpot_p90_s),
            "yes" if pair.agrees else "NO",
        )
    return drawn


def _milliseconds(before_s: float, predicted_s: float, measured_s: float) -> str:
    told = error(predicted_s, measured_s)
    return f"{before_s * 1e3:.0f} / {predicted_s * 1e3:.0f} / {measured_s * 1e3:.0f} ({told:+.0%})"


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", type=Path, help="of this machine, from disagg profile; measured when missing")
    parser.add_argument("--traces", type=Path, help="folder with azure2023_conv.jsonl.gz and azure2023_code.jsonl.gz")
    parser.add_argument("--requests", type=int, default=80, help="of each run")
    parser.add_argument("--runs", type=int, default=3, help="of each case, with other requests each time")
    parser.add_argument("--slo", type=parse_slo, help="instead of each workload's own")
    parser.add_argument("--placements", nargs="+", choices=PLACEMENTS, default=list(PLACEMENTS))
    parser.add_argument("--workloads", nargs="+", choices=SLOS, default=list(SLOS))
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS))
    parser.add_argument("--no-lend-cores", action="store_true", help="instances keep their cores to themselves")
    parser.add_argument("--json", action="store_true", help="print one line of JSON for each run")
    return parser.parse_args()


def main() -> int:
    """Compare and print; return the exit status."""
    options = parse()
    console = Console(stderr=True)
    with terminable(), tempfile.TemporaryDirectory() as folder:
        profile = options.profile
        if profile is None:
            profile = Path(folder) / "profile.json"
            subprocess.run([sys.executable, "-m", "disagg.cli.main", "profile", "-o", str(profile)], check=True)
        pairs = compare(options, profile, console)
    if options.json:
        for pair in pairs:
            print(msgspec.json.encode(pair).decode())
    else:
        Console(width=200).print(table(pairs))
    return 0 if all(pair.agrees for pair in pairs) else 1


if __name__ == "__main__":
    sys.exit(main())
