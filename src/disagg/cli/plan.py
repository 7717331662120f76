"""``disagg plan``: the placement that serves the most within the objectives."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import click

from disagg.base.config import MAX_INSTANCES, CacheSettings
from disagg.base.errors import ConfigurationError
from disagg.cli.flags import build, flags_of
from disagg.cli.placement_file import write_placement
from disagg.cli.plan_problem import choose_problem
from disagg.cli.plan_report import print_plan
from disagg.cli.values import Count, Name, Number, OutputPath
from disagg.cli.workload_flags import WORKLOAD_HELP, SloTargetType, workload_options
from disagg.costs.devices import DEVICES
from disagg.measure.slo import SloTarget
from disagg.placement.describe import describe
from disagg.placement.planner import OnProgress, Progress, search
from disagg.placement.problem import CostUnit
from disagg.placement.workers import open_workers
from disagg.simulator.engines import IMITATED

_FILE: Final = click.Path(path_type=Path)


@click.command(epilog=WORKLOAD_HELP)
@click.option("--cluster", type=_FILE, metavar="FILE", help="Nodes, devices, links, prices from a YAML file.")
@click.option(
    "--devices",
    "num_devices",
    type=Count(min=1, max=MAX_INSTANCES),
    metavar="N",
    help="Instead: one node of N devices.",
)
@click.option("--model", metavar="NAME|config.json", help="Model, unless the latency file names it.")
@click.option(
    "--latency",
    metavar="FILE|NAME",
    help=f"Step times, as for disagg simulate: a device ({', '.join(DEVICES)}), operator tables, a profile, or "
    "'published'.  [default: the roofline of each device of the cluster]",
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
@click.option("--max-nodes", type=Count(min=1), default=4, show_default=True, help="Nodes that an instance may span.")
@click.option("--seeds", type=Count(min=1), default=3, show_default=True, metavar="K", help="Of the final runs.")
@click.option(
    "--workers", type=Count(min=1), metavar="N", help="Processes that simulate.  [default: one for each core]"
)
@flags_of(CacheSettings)
@click.option("-o", "--output", type=OutputPath("the placement"), metavar="FILE.yaml", help="Write the best placement.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def plan(slo: SloTarget, output: Path | None, as_json: bool, **values: Any) -> None:
    """Find the placement that serves the most requests within the objectives.

    Simulates the real policies. Ctrl-C prints the best so far.
    """
    problem = choose_problem(values, slo, build(CacheSettings, values))
    begin_s = time.monotonic()
    with open_workers(values["workers"]) as workers, _shown_progress() as on_progress:
        found = search(problem, workers, on_progress)
    if not found.judged:
        raise ConfigurationError("no placement fits on the devices: give the cluster more, or allow --max-nodes")
    result = describe(found)
    if output is not None:
        write_placement(result.best.placement, output)
    print_plan(result, as_json, time.monotonic() - begin_s)


@contextmanager
def _shown_progress() -> Iterator[OnProgress]:
    """Show on stderr how far the search is, and the best so far."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("plan"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("bounds", total=None)

        def show(progress: Progress) -> None:
            bar.update(task, completed=progress.done, total=progress.total, description=f"best: {progress.best}")

        yield show
