"""How ``disagg bench serve`` prints its report: for people, or as JSON."""

import math
from collections.abc import Callable, Sequence
from typing import Final

import click
import msgspec
from rich.console import Console
from rich.table import Table

from disagg.bench.client.load_report import SeedRun, ServeReport
from disagg.bench.report.runs import pool_shares
from disagg.measure.statistics import Estimate, Percentiles
from disagg.measure.summary import RunSummary


def print_report(report: ServeReport, as_json: bool) -> None:
    """Write the report to stdout."""
    if as_json:
        click.echo(msgspec.json.encode(report).decode())
        return
    console = Console(highlight=False, soft_wrap=True)
    summaries = [run.summary for run in report.runs]
    seeds = f", {len(report.runs)} runs" if len(report.runs) > 1 else ""
    console.print(f"[bold]{report.model}[/] at {report.url}, {report.endpoint}")
    console.print(f"{summaries[0].num_requests} requests of {report.workload}, {report.load}{seeds}\n")
    console.print(_latencies(summaries))
    for line in (*_outcome(report), *_stages(summaries), *_client(report.runs), *_remarks(report)):
        console.print(line)


_ROWS: Final[dict[str, Callable[[RunSummary], Percentiles]]] = {
    "TTFT": lambda summary: summary.ttft,
    "TPOT": lambda summary: summary.tpot,
    "ITL": lambda summary: summary.itl,
    "E2E": lambda summary: summary.e2e,
    "longest gap": lambda summary: summary.longest_gap,
    "pause": lambda summary: summary.pauses,
}


def _latencies(summaries: Sequence[RunSummary]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("ms", "mean", "P50", "P90", "P99"):
        table.add_column(heading, justify="left" if heading == "ms" else "right")
    for name, get in _ROWS.items():
        rows = [get(summary) for summary in summaries]
        if name == "pause" and all(math.isnan(row.mean) for row in rows):
            continue
        estimates = [Estimate.of([getattr(row, field) for row in rows]) for field in ("mean", "p50", "p90", "p99")]
        table.add_row(name, *(_with_error(estimate, 1e3, ".1f") for estimate in estimates))
    return table


def _outcome(report: ServeReport) -> list[str]:
    summaries = [run.summary for run in report.runs]
    total = sum(summary.num_requests for summary in summaries)
    errors: dict[str, int] = {}
    for summary in summaries:
        for kind, count in summary.errors.items():
            errors[kind] = errors.get(kind, 0) + count
    failed = "".join(f", {count} {kind}" for kind, count in errors.items())
    rate = _mean([summary.request_rate for summary in summaries])
    output = _mean([summary.output_tokens_per_s for summary in summaries])
    all_tokens = _mean([summary.total_tokens_per_s for summary in summaries])
    return [
        f"\nfinished    {sum(summary.num_finished for summary in summaries)} of {total}{failed}",
        f"throughput  {rate:.3g} requests/s, {output:.0f} output tokens/s, {all_tokens:.0f} tokens/s in all",
        _attainment(report),
        f"target      {report.target}: " + (f"missed, {', '.join(report.missed)}" if report.missed else "kept"),
        f"good rate   {_with_error(report.good_rate, 1, '.3g')} requests/s kept both",
    ]


def _attainment(report: ServeReport) -> str:
    summaries, slo = [run.summary for run in report.runs], report.slo
    interval = pool_shares([summary.attainment for summary in summaries])
    told = f"[bold]{interval.share:.1%}[/] (95% interval {interval.low:.1%} to {interval.high:.1%})"
    parts = {
        f"TTFT <= {slo.ttft_s * 1e3:g} ms": _mean([summary.ttft_attainment.share for summary in summaries]),
        f"TPOT <= {slo.tpot_s * 1e3:g} ms": _mean([summary.tpot_attainment.share for summary in summaries]),
    }
    return f"attainment  {told} of " + " and ".join(f"{what} ({part:.1%} alone)" for what, part in parts.items())


def _stages(summaries: Sequence[RunSummary]) -> list[str]:
    names = dict.fromkeys(stage for summary in summaries for stage in summary.stage_shares)
    shares = {name: _mean([summary.stage_shares.get(name, 0.0) for summary in summaries]) for name in names}
    told = ", ".join(f"{name.replace('_', ' ')} {share:.1%}" for name, share in shares.items() if share >= 5e-4)
    return [f"time spent  {told}"] if told else []


def _client(runs: Sequence[SeedRun]) -> list[str]:
    lateness = Percentiles.of([run.summary.lateness.p99 for run in runs])
    lag = Percentiles.of([run.client.loop_lag.p99 for run in runs])
    cores = _mean([run.client.cores for run in runs])
    return [
        f"client      {cores:.1%} of a core; sent late by {lateness.mean * 1e3:.1f} ms, "
        f"event loop late by {lag.mean * 1e3:.1f} ms (P99)"
    ]


def _remarks(report: ServeReport) -> list[str]:
    lines = []
    for run in report.runs:
        lines += [f"[yellow]run ended early[/]: {run.stopped}"] if run.stopped else []
        lines += [f"[yellow]client[/]: {fault}" for fault in run.client.faults]
        lines += [f"[yellow]note[/]: {note}" for note in run.notes]
    lines = list(dict.fromkeys(lines))
    if len(report.runs) == 1:
        lines.append("[dim]one run is a look, no claim: --seeds 3 tells how runs differ[/]")
    return lines


def _with_error(estimate: Estimate, factor: float, style: str) -> str:
    if math.isnan(estimate.mean):
        return "-"
    value = f"{estimate.mean * factor:{style}}"
    return value if math.isnan(estimate.half_width) else f"{value} ± {estimate.half_width * factor:{style}}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
