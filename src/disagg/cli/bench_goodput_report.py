"""How ``disagg bench goodput`` prints its report: for people, or as JSON."""

import click
import msgspec
from rich.console import Console
from rich.table import Table

from disagg.bench.client.goodput_report import GoodputReport, RatePoint


def print_report(report: GoodputReport, as_json: bool) -> None:
    """Write the report to stdout."""
    if as_json:
        click.echo(msgspec.json.encode(report).decode())
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"[bold]{report.model}[/] at {report.url}, {report.endpoint}, {report.workload}")
    tails = "".join(f", {tail}" for tail in report.tails)
    console.print(
        f"{report.target * 100:.4g}% of requests within {report.slo}{tails}; {report.run_s:g} s at each rate, "
        f"{len(report.seeds)} seed{'s' * (len(report.seeds) > 1)}\n"
    )
    console.print(_rates(report))
    if report.scales:
        told = "  ".join(f"{point.scale:g}x {point.attainment.share:.0%}" for point in report.scales)
        console.print(f"\nattainment at {report.rate:.3g} requests/s, objectives times:\n  {told}")
    console.print(f"\n{_verdict(report)}")
    for note in report.notes:
        console.print(f"[yellow]note[/]: {note}")
    if len(report.seeds) == 1:
        console.print("[dim]one seed is a look, no claim: --seeds 3 runs three at each rate[/]")


def _rates(report: GoodputReport) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("requests/s", "attainment", "95% interval", "TTFT P90", "TPOT P90", "requests", ""):
        table.add_column(heading, justify="left" if heading == "" else "right", no_wrap=True)
    for point in report.points:
        share = point.attainment
        table.add_row(
            f"{point.rate:.3g}",
            f"{'>= ' * point.is_cut}{share.share:.1%}",
            "-" if point.is_cut else f"{share.low:.0%} to {share.high:.0%}",
            f"{point.ttft.p90 * 1e3:.0f} ms",
            f"{point.tpot.p90 * 1e3:.1f} ms",
            str(share.total),
            "[green]met[/]" if point.is_met else f"[red]missed[/]{_why(report, point)}" + ", cut" * point.is_cut,
        )
    return table


def _why(report: GoodputReport, point: RatePoint) -> str:
    """Return what was missed, where it may be a percentile: attainment has a column of its own."""
    return f": {', '.join(point.missed)}" if report.tails else ""


def _verdict(report: GoodputReport) -> str:
    devices = f"{report.num_devices} device{'s' * (report.num_devices > 1)}"
    if report.is_num_devices_assumed:
        devices += " (assumed: give --devices)"
    end = " (interrupted)" if report.is_interrupted else ""
    if report.goodput is None:
        if report.is_hopeless:
            return f"goodput  [bold]none[/]: one request at a time misses {report.slo} as well{end}"
        lowest = "" if report.missed_rate is None else f": {report.missed_rate:.3g} requests/s missed"
        return f"goodput  [bold]none found[/]{lowest}{end}"
    if report.missed_rate is None:
        return f"goodput  at least [bold]{report.goodput:.3g}[/] requests/s per device: no rate missed{end}"
    high = report.missed_rate / report.num_devices
    return (
        f"goodput  [bold]{report.goodput:.3g}[/] requests/s per device (met; {high:.3g} missed), {report.rate:.3g} in "
        f"all on {devices}{end}"
    )
