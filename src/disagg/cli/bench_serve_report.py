"""The report of ``disagg bench serve``, for people and as JSON."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import click
import msgspec

from disagg.bench.client.plan import ClosedLoad, OpenLoad, SessionLoad
from disagg.bench.client.run import LoadResult
from disagg.bench.report.runs import pool_shares
from disagg.measure.slo import Slo
from disagg.measure.statistics import Estimate, Percentiles
from disagg.measure.summary import RunSummary, summarize

if TYPE_CHECKING:
    from rich.table import Table

    from disagg.bench.report.runs import SystemRun


class ClientCost(msgspec.Struct, frozen=True, kw_only=True):
    """The client's own part in a run. ``faults`` say where it shows in the figures."""

    cpu_s: float
    cores: float
    loop_lag: Percentiles
    faults: tuple[str, ...]


class SeedRun(msgspec.Struct, frozen=True, kw_only=True):
    """One run. ``good_rate`` are requests/s that kept both objectives."""

    seed: int
    prompt_seed: int
    summary: RunSummary
    good_rate: float
    client: ClientCost
    stopped: str
    notes: tuple[str, ...]


class ServeReport(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that was asked and found. Times in seconds, rates in requests/s; what is not known is null."""

    url: str
    endpoint: str
    model: str
    workload: str
    load: str
    num_users: int | None
    slo: Slo
    attainment: Estimate
    ttft_p50_s: Estimate
    tpot_p50_s: Estimate
    good_rate: Estimate
    runs: tuple[SeedRun, ...]


def measured(result: LoadResult, seed: int) -> SeedRun:
    """Return what one run says."""
    summary = summarize(result.records, result.plan.limits.slo, is_open_loop=result.plan.is_open_loop)
    return SeedRun(
        seed=seed,
        prompt_seed=result.prompt_seed,
        summary=summary,
        good_rate=summary.good_rate,
        client=ClientCost(
            cpu_s=result.client_cpu_s,
            cores=result.client_cores,
            loop_lag=result.loop_lag,
            faults=tuple(result.client_faults()),
        ),
        stopped=result.stopped,
        notes=result.notes,
    )


def serve_report(workload: str, first_seed: int, results: Sequence[LoadResult]) -> ServeReport:
    """Return what all runs of one load say, one for each seed from ``first_seed`` on."""
    runs = tuple(measured(result, first_seed + number) for number, result in enumerate(results))
    plan, summaries = results[0].plan, [run.summary for run in runs]
    return ServeReport(
        url=plan.server.base_url,
        endpoint=plan.server.endpoint.value,
        model=results[0].model,
        workload=workload,
        load=_load_words(results[0], summaries),
        num_users=None if isinstance(plan.load, OpenLoad) else plan.load.num_users,
        slo=plan.limits.slo,
        attainment=Estimate.of([summary.attainment.share for summary in summaries]),
        ttft_p50_s=Estimate.of([summary.ttft.p50 for summary in summaries]),
        tpot_p50_s=Estimate.of([summary.tpot.p50 for summary in summaries]),
        good_rate=Estimate.of([summary.good_rate for summary in summaries]),
        runs=runs,
    )


def system_runs(
    report: ServeReport, results: Sequence[LoadResult], *, rate: float, num_devices: int, name: str = ""
) -> "list[SystemRun]":
    """Return the runs as ``disagg bench report`` takes them; ``rate`` is what was asked for, equal for all seeds."""
    from disagg.bench.report.runs import Load, SystemRun
    from disagg.measure.machine import this_machine

    settings = {"URL": report.url, "Endpoint": report.endpoint, "Model": report.model}
    return [
        SystemRun(
            system=name or report.model,
            workload=report.workload,
            load=Load(rate=rate, num_users=report.num_users or 0),
            seed=run.seed,
            num_devices=num_devices,
            slo=report.slo,
            records=result.records,
            settings=settings,
            machine=this_machine(),
            client_cores=run.client.cores,
            notes=(*((run.stopped,) if run.stopped else ()), *run.notes, *run.client.faults),
        )
        for run, result in zip(report.runs, results, strict=True)
    ]


def _load_words(result: LoadResult, summaries: Sequence[RunSummary]) -> str:
    match result.plan.load:
        case OpenLoad():
            return f"{_mean([summary.offered_rate for summary in summaries]):.3g} requests/s"
        case ClosedLoad(num_users=num_users, think_s=think_s):
            return f"{num_users} users" + (f" who think {think_s:g} s" if think_s else "")
        case SessionLoad(num_users=num_users, sessions=sessions):
            at = "at their times" if num_users is None else f"of {num_users} users"
            return f"{len(sessions)} sessions {at}"


def print_report(report: ServeReport, as_json: bool) -> None:
    """Write the report to stdout."""
    if as_json:
        click.echo(msgspec.json.encode(report).decode())
        return
    from rich.console import Console

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
}


def _latencies(summaries: Sequence[RunSummary]) -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("ms", "mean", "P50", "P90", "P99"):
        table.add_column(heading, justify="left" if heading == "ms" else "right")
    for name, get in _ROWS.items():
        rows = [get(summary) for summary in summaries]
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
