"""``disagg profile``: measure what steps, pulls and messages take on this machine, for ``disagg simulate``."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from disagg.base.config import CacheSettings, InstanceGroup, ModelSettings, Placement, SchedulerSettings
from disagg.base.errors import ConfigurationError
from disagg.base.request import Role
from disagg.cli.flags import IntegerList, build, flag_name, flags_of
from disagg.cli.profile_report import print_summary
from disagg.cli.values import Number, OutputPath
from disagg.costs.profile import save_profile
from disagg.serve.launch.deployment import Deployment, HostSettings

if TYPE_CHECKING:
    from disagg.calibration.steps.campaign import OnProgress

_PAIR: Final = Placement(groups=(InstanceGroup(role=Role.PREFILL, count=1), InstanceGroup(role=Role.DECODE, count=1)))
_SERVER_SETTINGS: Final = (ModelSettings, CacheSettings, SchedulerSettings, HostSettings)


@click.command()
@click.argument("model", required=False)
@click.option(
    "-o",
    "--output",
    type=OutputPath("the profile"),
    required=True,
    metavar="FILE.json",
    help="Where the profile goes.",
)
@click.option(
    "--threads",
    type=IntegerList(),
    default=(),
    metavar="LIST",
    help="Compute threads of an instance, such as 1,2: each number is measured.  [default: one, half the cores, all]",
)
@click.option("--quick", is_flag=True, help="Fewer steps, each measured less often: a look, in minutes.")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Of the steps and their order.")
@click.option(
    "--temperature",
    type=Number(min=0),
    default=0.0,
    show_default=True,
    help="Of sampling: above 0, each token costs two more passes over the vocabulary.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@flags_of(ModelSettings, without={"model"})
@flags_of(CacheSettings, SchedulerSettings, without={"objectives"})
@flags_of(HostSettings, without={"event_log", "latency", "lend_cores", "threads"})
def profile(model: str | None, output: Path, threads: tuple[int, ...], as_json: bool, **values: Any) -> None:
    """Measure how long MODEL takes on this machine, for disagg simulate --latency FILE.json.

    Times the steps of a live instance on the cores that disagg serve would give it, alone and while a second instance
    computes on its own cores; the hand-over of KV blocks; and what HTTP and messages add. Takes 4 minutes, and 1 or 2
    more for each further number of threads.
    """
    if 0 in threads:
        raise ConfigurationError("--threads 0: an instance computes on one thread at least")
    deployment = Deployment(
        placement=_PAIR,
        model=build(ModelSettings, values | {"model": model}),
        cache=build(CacheSettings, values),
        scheduler=build(SchedulerSettings, values),
        host=build(HostSettings, values | {"event_log": None, "latency": None, "threads": None}),
    )
    from disagg.bench.compare.server_process import terminable
    from disagg.calibration.profiling import make_profile

    with terminable(), _shown_progress() as on_progress:
        made = make_profile(
            deployment,
            serve_arguments(values),
            on_progress,
            threads=threads,
            seed=values["seed"],
            quick=values["quick"],
            temperature=values["temperature"],
        )
    from disagg.calibration.profile_summary import summarise

    save_profile(made.profile, output)
    for warning in made.warnings:
        click.echo(f"warning: {warning}", err=True)
    print_summary(summarise(made.profile, output), as_json)


def serve_arguments(values: dict[str, Any]) -> Sequence[str]:
    """Return the flags of ``disagg serve`` that say what the flags of this command say."""
    arguments = []
    for name in (name for kind in _SERVER_SETTINGS for name in kind.__struct_fields__):
        value = values.get(name)
        if isinstance(value, bool):
            arguments.append(flag_name(name) if value else flag_name(name).replace("--", "--no-", 1))
        elif value is not None and value != ():
            arguments += [flag_name(name), ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return arguments


@contextmanager
def _shown_progress() -> "Iterator[OnProgress]":
    """Show on stderr what is being measured, one bar for each part."""
    from rich.console import Console
    from rich.progress import Progress, TaskID

    with Progress(console=Console(stderr=True), transient=True) as progress:
        tasks: dict[str, TaskID] = {}

        def show(what: str, fraction: float) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=1.0)
            progress.update(tasks[what], completed=fraction)

        yield show
