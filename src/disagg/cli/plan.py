"""``disagg plan``: the placement that serves the most within the objectives."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import click
from msgspec import structs

from disagg.base.config import MAX_INSTANCES, CacheSettings
from disagg.base.errors import ConfigurationError
from disagg.base.transfer_settings import KvTransferDtype
from disagg.cli.flags import build, flags_of
from disagg.cli.placement_file import read_placement, write_placement
from disagg.cli.plan_page import write_page
from disagg.cli.plan_problem import OVERLAY, choose_host_problem, choose_problem, is_for_a_host
from disagg.cli.plan_report import print_plan
from disagg.cli.values import Count, Name, Number, OutputPath
from disagg.cli.workload_flags import WORKLOAD_HELP, SloTargetType, workload_options
from disagg.costs.devices import DEVICES
from disagg.measure.slo import SloTarget
from disagg.placement.beside import composition_of
from disagg.placement.curves import attainment_curves
from disagg.placement.describe import describe
from disagg.placement.describe_host import describe_host
from disagg.placement.host_planner import search_host
from disagg.placement.k8s_manifests import k8s_manifests
from disagg.placement.k8s_overlay import k8s_overlay
from disagg.placement.layout import PlacedInstance
from disagg.placement.plan import Plan
from disagg.placement.planner import search
from disagg.placement.problem import CostUnit
from disagg.placement.progress import OnProgress, PlanProgress
from disagg.placement.sensitivity import prompt_shifts, rate_shifts
from disagg.placement.vllm_commands import vllm_script
from disagg.placement.workers import Workers, open_workers
from disagg.simulator.engines import IMITATED

Made = tuple[Plan, tuple[PlacedInstance, ...]]
"""A plan, and the instances of its best placement on their devices: none where they are not a cluster's."""
_OF_VLLM: Final = {"vllm": vllm_script, "k8s-vllm": k8s_manifests}
"""What starts the instances of a cluster's plan; people with GPUs run vLLM."""
_FILE: Final = click.Path(path_type=Path)


@click.command(epilog=WORKLOAD_HELP)
@click.option(
    "--cluster", metavar="FILE|ray", help="Nodes, devices, links, prices from a YAML file, or nodes from Ray."
)
@click.option(
    "--devices",
    "num_devices",
    type=Count(min=1, max=MAX_INSTANCES),
    metavar="N",
    help="Instead: one node of N devices, or, with a profile, N cores.",
)
@click.option("--model", metavar="NAME|config.json", help="Model, unless the latency file names it.")
@click.option(
    "--latency",
    metavar="FILE|NAME",
    help=f"Step times, as for disagg simulate: a device ({', '.join(DEVICES)}), operator tables, or 'published'; a "
    "profile plans for the cores of its machine.  [default: the roofline of each device of the cluster]",
)
@click.option("--engine", type=Name(["disagg", *IMITATED]), default="disagg", show_default=True, help="Whose rules.")
@workload_options
@click.option(
    "--slo",
    type=SloTargetType(),
    default="ttft=250ms,tpot=100ms@90%",
    show_default=True,
    help="Objectives, the part of requests that keep both, and limits on percentiles such as ttft.p99<=2s.",
)
@click.option(
    "--target-rate",
    type=Number(min=0, min_open=True),
    metavar="R",
    help="Requests/s to serve at the least cost.  [default: as many as the cluster can]",
)
@click.option(
    "--per",
    type=Name([unit.value for unit in CostUnit]),
    help="Compare goodput per device, dollar an hour or watt.  [default: the rate of the whole cluster]",
)
@click.option(
    "--kv-transfer-dtype",
    type=Name([dtype.value for dtype in KvTransferDtype]),
    default=KvTransferDtype.AUTO.value,
    show_default=True,
    help="Form of KV blocks over TCP: raw, int8 (lossy), or auto, int8 where more requests are served in time by it.",
)
@click.option(
    "--lend-cores/--no-lend-cores",
    default=None,
    help="With a profile: instances without a step lend their cores to their neighbours' steps.  [default: they do]",
)
@click.option("--max-nodes", type=Count(min=1), default=4, show_default=True, help="Nodes that an instance may span.")
@click.option(
    "--beside",
    type=_FILE,
    multiple=True,
    metavar="FILE.yaml",
    help="Judge this placement too, with the same requests. May be given several times.",
)
@click.option("--seeds", type=Count(min=1), default=3, show_default=True, metavar="K", help="Of the final runs.")
@click.option(
    "--workers", type=Count(min=1), metavar="N", help="Processes that simulate.  [default: one for each core]"
)
@flags_of(CacheSettings)
@click.option("-o", "--output", type=OutputPath("the placement"), metavar="FILE.yaml", help="Write the best placement.")
@click.option(
    "--sensitivity",
    is_flag=True,
    help="Also find which placement is best when prompts are longer or shorter.",
)
@click.option("--html", type=OutputPath("the page"), metavar="FILE", help="Write the plan as a page, with its curves.")
@click.option(
    "--as",
    "launch_as",
    type=Name([OVERLAY, *_OF_VLLM]),
    help="Print the best placement in place of the report: for Kubernetes (k8s, with a profile), as start commands of "
    "vLLM, or as Kubernetes manifests of vLLM.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def plan(slo: SloTarget, output: Path | None, as_json: bool, **values: Any) -> None:
    """Find the placement that serves the most requests within the objectives.

    Simulates the real policies. Ctrl-C prints the best so far.
    """
    begin_s = time.monotonic()
    cache = build(CacheSettings, values)
    make = _host_plan if is_for_a_host(values) else _cluster_plan
    with open_workers(values["workers"]) as workers, _shown_progress() as on_progress:
        result, placed = make(values, slo, cache, workers, on_progress)
    if output is not None:
        write_placement(result.best.placement, output)
    if values["html"] is not None:
        write_page(result, values["html"])
    if values["launch_as"] is not None:
        click.echo(_launch(values, result, placed, cache), nl=False)
        return
    print_plan(result, as_json, time.monotonic() - begin_s)


def _launch(values: dict[str, Any], result: Plan, placed: tuple[PlacedInstance, ...], cache: CacheSettings) -> str:
    if values["launch_as"] == OVERLAY:
        return k8s_overlay(result.best.placement, cache)
    return _OF_VLLM[values["launch_as"]](placed, values["model"] or "MODEL")


def _cluster_plan(
    values: dict[str, Any], slo: SloTarget, cache: CacheSettings, workers: Workers, on_progress: OnProgress
) -> Made:
    problem = choose_problem(values, slo, cache)
    beside = [composition_of(problem, read_placement(file)) for file in values["beside"]]
    found = search(problem, workers, on_progress, beside)
    if not found.judged:
        raise ConfigurationError("no placement fits on the devices: give the cluster more, or allow --max-nodes")
    result = structs.replace(describe(found), rate_shifts=rate_shifts(found))
    if values["html"] is not None:
        result = structs.replace(result, curves=attainment_curves(found, workers))
    if values["sensitivity"] or values["html"] is not None:
        result = structs.replace(result, prompt_shifts=prompt_shifts(found, workers))
    return result, found.judged[0].placed


def _host_plan(
    values: dict[str, Any], slo: SloTarget, cache: CacheSettings, workers: Workers, on_progress: OnProgress
) -> Made:
    problem = choose_host_problem(values, slo, cache)
    return describe_host(problem, *search_host(problem, workers, on_progress)), ()


@contextmanager
def _shown_progress() -> Iterator[OnProgress]:
    """Show on stderr how far the search is, and the best so far."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("plan"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("bounds", total=None)

        def show(progress: PlanProgress) -> None:
            bar.update(task, completed=progress.done, total=progress.total, description=f"best: {progress.best}")

        yield show
