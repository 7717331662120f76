"""``disagg simulate``: what a placement would do under a workload, by running the real policies in virtual time."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import click

from disagg.base.config import MAX_INSTANCES, CacheSettings, Placement, RouterSettings, SchedulerSettings
from disagg.base.elastic_settings import Replan
from disagg.base.errors import ConfigurationError
from disagg.base.request import Role
from disagg.base.transfer_settings import TransferSettings
from disagg.cli.flags import build, flags_of
from disagg.cli.placement_file import choose_placement, choose_transfer, classes_of
from disagg.cli.simulate_platform import (
    ChosenPlatform,
    choose_cluster,
    choose_platform,
    choose_rules,
    lent_cores,
    with_threads,
)
from disagg.cli.simulate_report import SimulationReport, print_report
from disagg.cli.values import Count, Name, Number, OutputPath
from disagg.cli.workload_flags import WORKLOAD_HELP, SloTargetType, choose_load, choose_target, workload_options
from disagg.costs.devices import DEVICES
from disagg.costs.thread_scaling import estimate_words
from disagg.measure.open_loop import OpenLoop
from disagg.measure.sessions import SessionWorkload
from disagg.measure.slo import Slo, SloTarget
from disagg.simulator.cluster import ClusterSpec
from disagg.simulator.engines import IMITATED, build_cluster, build_spares
from disagg.simulator.evaluate import Evaluation, evaluate, search_goodput
from disagg.simulator.event_log import EventLogFolder
from disagg.simulator.timeline_page import TimelineRecorder

_COUNT: Final = Count(min=0, max=MAX_INSTANCES)
_START_SPARE_S: Final = 2.0
"""From when an instance is added to when it takes requests."""
_FILE: Final = click.Path(path_type=Path)


@click.command(epilog=WORKLOAD_HELP)
@click.option("--prefill", type=_COUNT, metavar="N", help="Prefill instances.  [default: 1, or 0 with --colocated]")
@click.option("--decode", type=_COUNT, metavar="N", help="Decode instances.  [default: 1, or 0 with --colocated]")
@click.option("--colocated", type=_COUNT, metavar="N", help="Instances that do both.  [default: 0]")
@click.option("--placement", type=_FILE, metavar="FILE", help="Instances, with their parallelism, from a YAML file.")
@click.option(
    "--cluster",
    type=_FILE,
    metavar="FILE",
    help="Nodes, devices and links from a YAML file. Instances go, in order, to the first node with room.  "
    "[default: one node]",
)
@click.option("--model", metavar="NAME|config.json", help="Model, unless the latency file names it.")
@click.option(
    "--latency",
    metavar="FILE|NAME",
    help=f"Step times: a profile, a device ({', '.join(DEVICES)}) for the roofline, a path FOLDER/a100_sxm of "
    "operator tables, or 'published' (OPT on A100).  [default: published where --engine is imitated]",
)
@click.option(
    "--threads",
    type=Count(min=1),
    metavar="N",
    help="Compute threads of each instance, with a profile.  [default: those of --placement, or its cores shared out]",
)
@click.option(
    "--lend-cores/--no-lend-cores",
    default=None,
    help="An instance without a step lends its cores to its neighbours' steps, with a profile.  [default: as the "
    "placement says, or where threads are not given]",
)
@click.option(
    "--engine",
    type=Name(["disagg", *IMITATED]),
    default="disagg",
    show_default=True,
    help="Whose rules to serve by. The flags of cache, scheduler and router below are for disagg alone.",
)
@workload_options
@click.option(
    "--slo",
    type=SloTargetType(),
    default="ttft=250ms,tpot=100ms@90%",
    show_default=True,
    help="Objectives, the part of requests that keep both, and limits on percentiles such as ttft.p99<=2s.",
)
@click.option("--attainment", type=Number(0, 1), metavar="PART", help="Part of requests, in place of that in --slo.")
@click.option(
    "--seeds",
    type=Count(min=1),
    default=1,
    show_default=True,
    metavar="K",
    help="Runs, where times are drawn.",
)
@click.option("--find-goodput", is_flag=True, help="Search the highest rate per device that keeps --slo.")
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
@flags_of(TransferSettings, without={"kv_link", "kv_digests", "kv_streams"})
@flags_of(CacheSettings, SchedulerSettings, RouterSettings)
def simulate(placement: Path | None, slo: SloTarget, as_json: bool, **values: Any) -> None:
    """Predict how a deployment serves a workload: latencies, SLO attainment, goodput.

    Runs the same router and scheduler code as disagg serve against a model of step times.
    """
    target = choose_target(slo, values["attainment"])
    chosen = choose_placement(placement, {role: values[role.value] for role in Role})
    rules = choose_rules(
        values["engine"],
        build(SchedulerSettings, values | {"objectives": target.slo.objectives()}),
        build(CacheSettings, values),
        build(RouterSettings, values | {"classes": classes_of(chosen)}),
    )
    source = values["latency"], values["model"], values["engine"], values["kv_memory_bytes"]
    on = choose_platform(*source) if values["cluster"] is None else choose_cluster(str(values["cluster"]), *source)
    lent = lent_cores(chosen, on, values["lend_cores"], values["threads"])
    chosen = _with_threads(chosen, on, values["threads"])
    spec = build_cluster(chosen, on.platform, rules, on.topology, on.by_kind, lent)
    spec = replace(spec, kv_transfer_dtype=choose_transfer(values, chosen).kv_transfer_dtype)
    if values["replan"] is not Replan.OFF:
        from disagg.placement.replanning import answer_question

        spec = replace(spec, planner=answer_question)
    if values["autoscale"] is not None:
        if on.topology is not None:
            raise ConfigurationError("--autoscale adds instances to one node: leave out --cluster")
        spec = replace(spec, spares=build_spares(chosen, on.platform, rules), start_spare_s=_START_SPARE_S)
    workload = choose_load(values)
    evaluation = _evaluate(spec, workload, target.slo, values["seeds"], values["events"], values["html"])
    goodput = None
    if values["find_goodput"]:
        goodput = search_goodput(spec, workload, target, num_seeds=values["seeds"])
    report = SimulationReport(
        platform=on.name,
        latency_errors=on.errors,
        engine=rules.name,
        notes=rules.notes,
        num_devices=evaluation.num_devices,
        rate=evaluation.rate,
        places={instance.name: tuple(map(str, instance.place)) for instance in spec.instances if instance.place},
        slo=target.slo,
        attainment=evaluation.attainment,
        attainment_target=target.attainment,
        tails=target.tails,
        missed=evaluation.missed(target),
        goodput=goodput,
        goodput_per_device=None if goodput is None else goodput / evaluation.num_devices,
        runs=evaluation.runs,
    )
    print_report(report, as_json)


def _with_threads(placement: Placement, on: ChosenPlatform, threads: int | None) -> Placement:
    """Return the placement with the threads of each instance; say so where step times on so many are an estimate."""
    told = with_threads(placement, on, threads)
    if on.profile is not None:
        for number in sorted({group.num_threads for group in told.groups if group.num_threads is not None}):
            words = estimate_words(on.profile, number)
            if words is not None:
                click.echo(f"note: {words}", err=True)
    return told


def _evaluate(
    spec: ClusterSpec,
    workload: OpenLoop | SessionWorkload,
    slo: Slo,
    num_seeds: int,
    events: Path | None,
    html: Path | None,
) -> Evaluation:
    """Evaluate, and write the decisions and the course of the first run where they are asked for."""
    timeline = None if html is None else TimelineRecorder(tuple(instance.name for instance in spec.instances))
    with ExitStack() as stack:
        log = None if events is None else stack.enter_context(EventLogFolder(events))
        evaluation = evaluate(spec, workload, slo, num_seeds=num_seeds, log=log, timeline=timeline)
    if timeline is not None and html is not None:
        timeline.write(html, f"{evaluation.runs[0].num_requests} requests on {len(spec.instances)} instance(s)")
    return evaluation
