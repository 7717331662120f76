"""``disagg bench compare``: several servers on the same cores, asked the same."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from disagg.cli.values import Count, OutputPath

if TYPE_CHECKING:
    from rich.console import Console

    from disagg.bench.compare.comparison import ComparisonProgress
    from disagg.bench.compare.ratios import LoadComparison, Ratio, Value
    from disagg.bench.compare.spec import ComparisonSpec
    from disagg.bench.report.runs import SystemRun

_FILE = click.Path(path_type=Path, dir_okay=False)
_INTERRUPTED_STATUS = 130


@click.command()
@click.argument("spec", type=_FILE, metavar="SPEC.yaml")
@click.option(
    "-o",
    "--output",
    type=OutputPath("the report"),
    metavar="FILE",
    help="Write the report of disagg bench report, as a page.",
)
@click.option("--png", type=OutputPath("the figures", is_folder=True), metavar="FOLDER", help="Write its figures.")
@click.option(
    "--save",
    type=OutputPath("the results", is_folder=True),
    metavar="FOLDER",
    help="Keep all records and the servers' logs, for disagg bench report FOLDER/results.json.",
)
@click.option("--system", "names", multiple=True, metavar="NAME", help="Only this one of the file; may be repeated.")
@click.option("--repeats", type=Count(min=1), metavar="N", help="Instead of what the file says.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures and ratios as JSON.")
def compare(
    spec: Path,
    output: Path | None,
    png: Path | None,
    save: Path | None,
    names: tuple[str, ...],
    repeats: int | None,
    as_json: bool,
) -> None:
    """Compare servers: start each on the same cores in turn, send all the same requests, print ratios.

    SPEC.yaml names systems (ours with flags of disagg serve, any other by a start command) and loads. The order of the
    systems is reversed with every repeat. Ctrl-C ends the server that runs, and tells what was measured until then.
    """
    from disagg.bench.compare.spec import choose_systems, read_spec

    comparison = read_spec(spec)
    if names:
        comparison = choose_systems(comparison, names)
    if repeats is not None:
        comparison = msgspec.structs.replace(comparison, repeats=repeats)
    with tempfile.TemporaryDirectory() as scratch:
        logs = save or Path(scratch)
        logs.mkdir(parents=True, exist_ok=True)
        runs: list[SystemRun] = []
        try:
            _collect(comparison, logs, runs)
        except KeyboardInterrupt:
            click.echo("interrupted: what was measured until then", err=True)
            _tell(comparison, runs, output, png, save, as_json)
            raise click.exceptions.Exit(_INTERRUPTED_STATUS) from None
        except BaseException:
            _tell(comparison, runs, output, png, save, as_json)
            raise
        _tell(comparison, runs, output, png, save, as_json)


def _collect(spec: "ComparisonSpec", logs: Path, runs: "list[SystemRun]") -> None:
    """Run the comparison; ``runs`` gets what is measured as it comes, so that nothing is lost with an error."""
    from disagg.bench.client.prompt_source import load_prompt_source
    from disagg.bench.compare.comparison import Comparison
    from disagg.bench.compare.server_process import terminable

    source = load_prompt_source(spec.model)
    with terminable(), _shown_progress() as watch, closing(Comparison(spec, source, logs, watch).runs()) as found:
        for run in found:
            runs.append(run)


def _tell(
    spec: "ComparisonSpec",
    runs: "list[SystemRun]",
    output: Path | None,
    png: Path | None,
    save: Path | None,
    as_json: bool,
) -> None:
    """Print and write all that was asked for; nothing when nothing was measured."""
    if not runs:
        return
    from disagg.bench.compare.ratios import compare as compare_runs
    from disagg.bench.report.report import ReportOptions, make_report
    from disagg.bench.report.saved import write_results

    if save is not None:
        write_results(save / "results.json", runs)
    comparisons = compare_runs(runs)
    if as_json:
        click.echo(msgspec.json.encode(comparisons).decode())
    else:
        _print_tables(spec, comparisons)
        _print_remarks(runs)
    if output is not None or png is not None:
        page = make_report(runs, options=ReportOptions(title=spec.title))
        if output is not None:
            page.write(output)
        if png is not None:
            page.write_pngs(png)


@contextmanager
def _shown_progress() -> "Iterator[Callable[[ComparisonProgress], None]]":
    """Show on stderr what is being done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from disagg.cli.bench_load import describe_progress

    columns = (MofNCompleteColumn(), BarColumn(bar_width=20), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False) as bar:
        task = bar.add_task("starting", total=None)

        def watch(progress: "ComparisonProgress") -> None:
            words = progress.words if progress.run is None else f"{progress.words}: {describe_progress(progress.run)}"
            bar.update(task, total=progress.num_runs, completed=progress.num_done, description=words)
            bar.refresh()

        yield watch


def _print_tables(spec: "ComparisonSpec", comparisons: "list[LoadComparison]") -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.print(
        f"[bold]{spec.title}[/]: {spec.repeats} repeat(s), order reversed each time; ratios to "
        f"[bold]{comparisons[0].systems[0]}[/], geometric means over repeats with 95% intervals\n"
    )
    for comparison in comparisons:
        _print_table(console, comparison)


def _print_table(console: "Console", comparison: "LoadComparison") -> None:
    from rich.table import Table

    from disagg.bench.compare.ratios import SLO_METRICS
    from disagg.bench.report.words import objectives
    from disagg.measure.slo import Slo

    limits = {"ttft_s": comparison.ttft_slo_s, "tpot_s": comparison.tpot_slo_s}
    slo = Slo(**{name: limit for name, limit in limits.items() if limit is not None})
    has_slo = slo != Slo()
    console.print(f"[bold]{comparison.workload}, {comparison.load}[/]" + (f"; {objectives(slo)}" if has_slo else ""))
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for system in comparison.systems:
        table.add_column(system, justify="right")
    for row in comparison.values:
        if any(value.mean is not None for value in row) and (has_slo or row[0].metric not in SLO_METRICS):
            table.add_row(row[0].metric, *(_cell(value) for value in row))
    console.print(table)
    console.print()


def _print_remarks(runs: "list[SystemRun]") -> None:
    """Say what was wrong with which run, each once."""
    remarks = []
    for run in runs:
        found = list(run.notes)
        if run.is_disturbed:
            found.append(f"disturbed: other processes kept {run.other_cores:.2f} of a core busy; measure again")
        remarks += [f"{run.system}, {run.load}, seed {run.seed}: {remark}" for remark in found]
    for remark in dict.fromkeys(remarks):
        click.secho(remark, fg="yellow")


def _cell(value: "Value") -> str:
    from disagg.bench.report.words import number, percent, seconds

    if value.mean is None:
        return "–"
    if value.unit == "s":
        words = seconds(value.mean)
    else:
        words = percent(value.mean) if value.unit == "share" else f"{number(value.mean)} {value.unit}".rstrip()
    return words if value.ratio is None else f"{words}  [dim]{_ratio_words(value.ratio)}[/]"


def _ratio_words(ratio: "Ratio") -> str:
    from disagg.bench.report.words import ratio as times

    if ratio.mean is None:
        return ""
    if ratio.low is None or ratio.high is None:
        return times(ratio.mean, 1.0)
    return f"{times(ratio.mean, 1.0)} ({times(ratio.low, 1.0)[1:]}–{times(ratio.high, 1.0)[1:]})"
