"""``disagg simulate``: what a placement would do under a workload, by running the real policies in virtual time."""

import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import click

from disagg.base.config import MAX_INSTANCES, CacheSettings, Placement, RouterSettings, SchedulerSettings
from disagg.base.request import Role
from disagg.cli.flags import build, flags_of
from disagg.cli.placement_file import choose_placement
from disagg.cli.simulate_platform import choose_platform, choose_rules
from disagg.cli.simulate_report import SimulationReport, print_report
from disagg.cli.values import Count, Name, Number, OutputPath
from disagg.cli.workload_flags import WORKLOAD_HELP, SloType, choose_load, workload_options
from disagg.measure.open_loop import OpenLoop
from disagg.measure.sessions import SessionWorkload
from disagg.measure.slo import Slo
from disagg.measure.statistics import Estimate
from disagg.simulator.cluster import ClusterSpec
from disagg.simulator.engines import IMITATED, build_cluster
from disagg.simulator.event_log import EventLog
from disagg.simulator.report import RunReport
from disagg.simulator.run import find_goodput
from disagg.simulator.run import simulate as run_simulation
from disagg.simulator.session_load import SessionLoad
from disagg.simulator.timeline_page import TimelineRecorder
from disagg.simulator.workload import simulated_requests

_COUNT: Final = Count(min=0, max=MAX_INSTANCES)
_FILE: Final = click.Path(path_type=Path)


@click.command(epilog=WORKLOAD_HELP)
@click.option("--prefill", type=_COUNT, metavar="N", help="Prefill instances.  [default: 1, or 0 with --colocated]")
@click.option("--decode", type=_COUNT, metavar="N", help="Decode instances.  [default: 1, or 0 with --colocated]")
@click.option("--colocated", type=_COUNT, metavar="N", help="Instances that do both.  [default: 0]")
@click.option("--placement", type=_FILE, metavar="FILE", help="Instances, with their parallelism, from a YAML file.")
@click.option("--model", metavar="NAME|config.json", help="Model, unless the latency file names it.")
@click.option(
    "--latency",
    metavar="FILE|NAME",
    help="Step times: a profile, a device (a100-sxm, h100-sxm, h200-sxm) for the roofline, a path FOLDER/a100_sxm of "
    "operator tables, or 'published' (OPT on A100).  [default: published where --engine is imitated]",
)
@click.option(
    "--engine",
    type=Name(["disagg", *IMITATED]),
    default="disagg",
    show_default=True,
    help="Whose rules to serve by. The flags of cache, scheduler and router below are for disagg alone.",
)
@workload_options
@click.option("--slo", type=SloType(), default="ttft=250ms,tpot=100ms", show_default=True, help="Latency objectives.")
@click.option(
    "--attainment",
    type=Number(0, 1),
    default=0.9,
    show_default=True,
    metavar="PART",
    help="Part of requests to keep them.",
)
@click.option(
    "--seeds",
    type=Count(min=1),
    default=1,
    show_default=True,
    metavar="K",
    help="Runs, where times are drawn.",
)
@click.option("--find-goodput", is_flag=True, help="Search the highest rate per device that keeps --attainment.")
@click.option(
    "--events",
    type=OutputPath("the events", is_folder=True),
    metavar="FOLDER",
    help="Write every decision of the first run, for replay.",
)
@click.option(
    "--html", type=OutputPath("the page"), metavar="FILE", help="Write the course of the first run as a page."
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@flags_of(CacheSettings, SchedulerSettings, RouterSettings)
def simulate(placement: Path | None, slo: Slo, as_json: bool, **values: Any) -> None:
    """Predict how a deployment serves a workload: latencies, SLO attainment, goodput.

    Runs the same router and scheduler code as disagg serve against a model of step times.
    """
    chosen = choose_placement(placement, {role: values[role.value] for role in Role})
    rules = choose_rules(
        values["engine"],
        build(SchedulerSettings, values),
        build(CacheSettings, values),
        build(RouterSettings, values),
    )
    chosen_platform = choose_platform(values["latency"], values["model"], values["engine"], values["kv_memory_bytes"])
    spec = build_cluster(chosen, chosen_platform.platform, rules)
    workload = choose_load(values)
    runs = _run_seeds(spec, workload, slo, values["seeds"], values["events"], values["html"])
    goodput = _goodput(spec, workload, slo, values) if values["find_goodput"] else None
    num_devices = _num_devices(chosen)
    report = SimulationReport(
        platform=chosen_platform.platform.name,
        latency_errors=chosen_platform.errors,
        engine=rules.name,
        notes=rules.notes,
        num_devices=num_devices,
        rate=workload.rate,
        slo=slo,
        attainment=Estimate.of([run.attainment for run in runs]),
        attainment_target=values["attainment"],
        goodput=goodput,
        goodput_per_device=None if goodput is None else goodput / num_devices,
        runs=runs,
    )
    print_report(report, as_json)


def _run_seeds(
    spec: ClusterSpec,
    workload: OpenLoop | SessionWorkload,
    slo: Slo,
    num_seeds: int,
    events: Path | None = None,
    html: Path | None = None,
) -> tuple[RunReport, ...]:
    """Run once for each seed; a workload that replays its own times is the same for all, so it runs once."""
    timeline = None if html is None else TimelineRecorder(tuple(instance.name for instance in spec.instances))

    block_size = spec.instances[0].block_size

    def run(seed: int, log: EventLog | None = None, timeline: TimelineRecorder | None = None) -> RunReport:
        if isinstance(workload, OpenLoop):
            requests = simulated_requests(workload.draw(seed), workload.name, block_size)
            return run_simulation(spec, requests, slo, log=log, timeline=timeline)
        load = SessionLoad(workload.draw(seed), block_size)
        return run_simulation(spec, load.first_calls(), slo, log=log, timeline=timeline, next_call=load.next_call)

    with ExitStack() as stack:
        log = None if events is None else stack.enter_context(EventLog(events))
        runs = [run(0, log, timeline)]
    if timeline is not None and html is not None:
        timeline.write(html, f"{runs[0].num_requests} requests on {len(spec.instances)} instance(s)")
    if workload.is_drawn:
        runs += [run(seed) for seed in range(1, num_seeds)]
    return tuple(runs)


def _goodput(spec: ClusterSpec, workload: OpenLoop | SessionWorkload, slo: Slo, values: dict[str, Any]) -> float:
    def attainment(rate: float) -> float:
        runs = _run_seeds(spec, workload.at_rate(rate), slo, values["seeds"])
        return sum(run.attainment for run in runs) / len(runs)

    start = workload.rate if math.isfinite(workload.rate) else 1.0
    return find_goodput(attainment, values["attainment"], start)


def _num_devices(placement: Placement) -> int:
    return sum(group.count * group.tensor_parallel * group.pipeline_parallel for group in placement.groups)
