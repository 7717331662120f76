"""The report of ``disagg bench goodput``, for people, as JSON, and for ``disagg bench report``."""

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from disagg.bench.client.goodput import GoodputFound, GoodputPlan, Trial
from disagg.bench.client.run import LoadResult
from disagg.measure.record import Ending
from disagg.measure.slo import Slo
from disagg.measure.statistics import Estimate, Percentiles, Share

if TYPE_CHECKING:
    from rich.table import Table


class RatePoint(msgspec.Struct, frozen=True, kw_only=True):
    """All runs at one rate: a point of the curve of attainment against rate.

    ``is_cut``: given up early; then the attainment is a lower bound, and latencies are of what finished.
    """

    rate: float
    attainment: Share
    is_met: bool
    is_cut: bool
    num_runs: int
    errors: dict[str, int]
    ttft: Percentiles
    tpot: Percentiles
    client_cores: float
    lateness_p99_s: float
    stopped: tuple[str, ...]


class ScalePoint(msgspec.Struct, frozen=True, kw_only=True):
    """Attainment at the goodput's rate with both objectives times ``scale``."""

    scale: float
    attainment: Share


class GoodputReport(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that was asked and found. Rates in requests/s (or sessions/s); an open end is null."""

    url: str
    endpoint: str
    model: str
    workload: str
    slo: Slo
    target: float
    run_s: float
    seeds: tuple[int, ...]
    tolerance: float
    num_devices: int
    is_num_devices_assumed: bool
    rate: float | None
    """Highest rate that met; null when none did."""
    missed_rate: float | None
    """Lowest rate that missed; null when none did."""
    goodput: float | None
    """``rate`` for each device."""
    is_interrupted: bool
    is_hopeless: bool
    """Not even one request at a time keeps the objectives."""
    points: tuple[RatePoint, ...]
    scales: tuple[ScalePoint, ...]
    notes: tuple[str, ...]


def goodput_report(
    asked: GoodputPlan, found: GoodputFound, *, workload: str, run_s: float, num_devices: int | None
) -> GoodputReport:
    """Return what a search says. ``num_devices`` None: not known, taken as 1."""
    results = [result for trial in found.trials for result in trial.results]
    server, slo = asked.plan.server, asked.plan.limits.slo
    rate = found.bracket.met or None
    notes = [note for result in results for note in (*result.client_faults(), *result.notes)]
    if any(trial.is_met and trial.rate > found.bracket.missed for trial in found.trials):
        notes.append("a higher rate than one that missed was met: the runs differ by more than the rates do")
    return GoodputReport(
        url=server.base_url,
        endpoint=server.endpoint.value,
        model=results[0].model if results else server.model,
        workload=workload,
        slo=slo,
        target=asked.target,
        run_s=run_s,
        seeds=tuple(asked.seeds),
        tolerance=asked.tolerance,
        num_devices=num_devices or 1,
        is_num_devices_assumed=num_devices is None,
        rate=rate,
        missed_rate=found.bracket.missed if math.isfinite(found.bracket.missed) else None,
        goodput=None if rate is None else rate / (num_devices or 1),
        is_interrupted=found.is_interrupted,
        is_hopeless=found.is_hopeless,
        points=tuple(_point(trial) for trial in found.trials),
        scales=tuple(
            ScalePoint(scale=scale, attainment=share) for scale, share in found.attainment_by_scale(slo).items()
        ),
        notes=tuple(dict.fromkeys(notes)),
    )


def _point(trial: Trial) -> RatePoint:
    records = [record for result in trial.results for record in result.records]
    finished = [record for record in records if record.ending is Ending.FINISHED]
    failed = [record for record in records if record.ending is not Ending.FINISHED]
    return RatePoint(
        rate=trial.rate,
        attainment=trial.attainment,
        is_met=trial.is_met,
        is_cut=trial.is_cut,
        num_runs=len(trial.results),
        errors=dict(Counter(record.error or record.ending.value for record in failed)),
        ttft=Percentiles.of([record.ttft_s for record in finished]),
        tpot=Percentiles.of([record.tpot_s for record in finished]),
        client_cores=max(result.client_cores for result in trial.results),
        lateness_p99_s=Percentiles.of([record.lateness_s for record in records]).p99,
        stopped=tuple(result.stopped for result in trial.results if result.stopped),
    )


def print_report(report: GoodputReport, as_json: bool) -> None:
    """Write the report to stdout."""
    if as_json:
        click.echo(msgspec.json.encode(report).decode())
        return
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    console.print(f"[bold]{report.model}[/] at {report.url}, {report.endpoint}, {report.workload}")
    console.print(
        f"{report.target:.0%} of requests within {report.slo}; {report.run_s:g} s at each rate, "
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


def _rates(report: GoodputReport) -> "Table":
    from rich.table import Table

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
            "[green]met[/]" if point.is_met else "[red]missed[/]" + ", cut" * point.is_cut,
        )
    return table


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


def save_search(path: Path, report: GoodputReport, found: GoodputFound, name: str) -> None:
    """Write all runs and the goodput for ``disagg bench report``; raise ConfigurationError when that fails."""
    from disagg.bench.report.runs import GoodputResult, Load, SystemRun
    from disagg.bench.report.saved import write_results
    from disagg.measure.machine import this_machine

    machine = this_machine()

    def system_run(trial: Trial, seed: int, result: LoadResult) -> SystemRun:
        return SystemRun(
            system=name or report.model,
            workload=report.workload,
            load=Load(rate=trial.rate),
            seed=seed,
            num_devices=report.num_devices,
            slo=report.slo,
            records=result.records,
            settings={"URL": report.url, "Endpoint": report.endpoint, "Model": report.model},
            machine=machine,
            client_cores=result.client_cores,
            notes=(*((result.stopped,) if result.stopped else ()), *result.notes, *result.client_faults()),
        )

    runs = [
        system_run(trial, seed, result)
        for trial in found.trials
        for seed, result in zip(report.seeds, trial.results, strict=False)
    ]
    goodput = []
    if report.rate is not None:
        # Not a spread over seeds, but how near the search has come.
        half_width = math.nan if report.missed_rate is None else report.missed_rate - report.rate
        goodput.append(
            GoodputResult(
                system=name or report.model,
                workload=report.workload,
                num_devices=report.num_devices,
                target=report.target,
                rate=Estimate(mean=report.rate, half_width=half_width),
            )
        )
    write_results(path, runs, goodput)
