"""``disagg bench report``: saved results as one page."""

import math
import re
from pathlib import Path

import click

from disagg.bench.report.window import Window
from disagg.cli.values import Number, OutputPath

_FILE = click.Path(path_type=Path, dir_okay=False)


class WindowType(click.ParamType[Window]):
    """A part of a run: start and length in seconds, 12.5,2."""

    name = "window"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Window:
        """Return the window."""
        if isinstance(value, Window):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?),(\d+(?:\.\d+)?)", str(value).replace(" ", ""))
        window = Window(float(match[1]), float(match[2])) if match else None
        if window is None or not window.start_s < window.end_s < math.inf:
            self.fail(f"{value!r} is no window: write start and length in seconds, such as 12.5,2", param, ctx)
        return window


@click.command()
@click.argument("results", nargs=-1, required=True, type=_FILE, metavar="RESULT.json...")
@click.option(
    "-o",
    "--output",
    type=OutputPath("the report"),
    default=Path("report.html"),
    show_default=True,
    metavar="FILE",
    help="The page, which loads nothing from anywhere.",
)
@click.option(
    "--png", type=OutputPath("the figures", is_folder=True), metavar="FOLDER", help="Write the figures as PNG too."
)
@click.option(
    "--window",
    type=WindowType(),
    metavar="START,SECONDS",
    help="Part of the run to show request by request.  [default: where answers stall most]",
)
@click.option(
    "--attainment",
    type=Number(0, 1),
    default=0.9,
    show_default=True,
    metavar="PART",
    help="Part of requests that should keep the objectives.",
)
@click.option("--title", default="Serving benchmark", show_default=True, help="Heading of the page.")
def report(
    results: tuple[Path, ...], output: Path, png: Path | None, window: Window | None, attainment: float, title: str
) -> None:
    """Draw saved runs as one page: tables, curves, distributions, and lanes in which stalls are seen.

    Systems stand in the order in which they are first named; the first one is what the others are compared with.
    """
    from disagg.bench.report.report import ReportOptions, make_report
    from disagg.bench.report.saved import read_results

    found = [read_results(path) for path in results]
    page = make_report(
        [run for one in found for run in one.runs],
        [result for one in found for result in one.goodput],
        ReportOptions(title, attainment, window),
    )
    page.write(output)
    click.echo(f"wrote {output}")
    if png is not None:
        click.echo(f"wrote {len(page.write_pngs(png))} figures in {png}")
