"""The report of ``disagg simulate``, for people and as JSON."""

import math
from collections.abc import Callable, Mapping, Sequence
from heapq import nlargest
from itertools import islice
from typing import Final

import click
import msgspec
from rich.console import Console
from rich.table import Table

from disagg.measure.slo import Slo, SloTarget, Tail
from disagg.measure.statistics import Estimate, Percentiles
from disagg.simulator.run_report import KvUse, PathUse, PromptTokens, RunReport

_ENOUGH: Final = 10
"""Times the TTFT objective: in a shorter run the requests that come first find no queue, and are most of them."""


class SimulationReport(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that was asked and found. Times in seconds, rates in requests/s."""

    platform: str
    latency_errors: dict[str, str]
    engine: str
    notes: tuple[str, ...]
    places: dict[str, tuple[str, ...]]
    """The devices of each instance as ``node:index``; nothing without a cluster file."""
    num_devices: int
    rate: float
    slo: Slo
    attainment: Estimate
    attainment_target: float
    tails: tuple[Tail, ...]
    missed: tuple[str, ...]
    """What of the target was not kept, in words; nothing where all was."""
    goodput: float | None
    goodput_per_device: float | None
    runs: tuple[RunReport, ...]


_MOST_INSTANCES: Final = 24
"""Of which each has its own lines."""


def print_report(report: SimulationReport, as_json: bool) -> None:
    """Write the report to stdout."""
    if as_json:
        click.echo(msgspec.json.encode(report).decode())
        return
    console = Console(highlight=False)
    first = report.runs[0]
    console.print(f"[bold]{report.platform}[/], rules of {report.engine}, {report.num_devices} device(s)")
    _print_places(console, report.places)
    for what, error in report.latency_errors.items():
        console.print(f"  step times, {what}: {error}")
    seeds = f", {len(report.runs)} seeds" if len(report.runs) > 1 else ""
    console.print(f"{first.num_requests} requests at {report.rate:.3g} requests/s{seeds}\n")
    console.print(_latencies(report.runs))
    console.print(_attainment(report))
    if report.goodput is not None:
        console.print(
            f"goodput  [bold]{report.goodput_per_device:.3g}[/] requests/s per device ({report.goodput:.3g} in all) "
            f"at {_target(report)}"
        )
        arrive_s = first.num_requests / report.goodput
        if arrive_s < _ENOUGH * report.slo.ttft_s < math.inf:
            console.print(
                f"  at that rate {first.num_requests} requests arrive within {arrive_s:.0f} s, and may wait for "
                f"{report.slo.ttft_s:g} s each: a queue that grows without end may not show; give more --requests"
            )
    console.print(_stages(report.runs))
    _print_kv(console, first.kv)
    if first.num_refused:
        console.print(f"{first.num_refused} requests were refused")
    for one in first.classes:
        console.print(
            f"class {one.name or 'none'}: {one.attainment:.1%} of {one.num_requests} requests kept their objectives, "
            f"{one.num_refused} refused"
        )
    if first.paths is not None:
        console.print(_paths(first.paths))
    if first.prompt_tokens.computed < first.prompt_tokens.total:
        console.print(_prompts(first.prompt_tokens))
    for time_s, words in first.decisions:
        console.print(f"at {time_s:.0f} s  {words}")
    if first.num_preemptions:
        console.print(f"{first.num_preemptions} preemptions")


def _print_places(console: Console, places: Mapping[str, Sequence[str]]) -> None:
    for instance, devices in islice(places.items(), _MOST_INSTANCES):
        console.print(f"  {instance} on {', '.join(devices)}")
    if len(places) > _MOST_INSTANCES:
        console.print(f"  and {len(places) - _MOST_INSTANCES} more: --json names all")


def _print_kv(console: Console, kv: Sequence[KvUse]) -> None:
    """Print how full the pools were: of a large fleet the fullest."""
    for use in kv if len(kv) <= _MOST_INSTANCES else nlargest(_MOST_INSTANCES, kv, _peak):
        console.print(f"KV of {use.instance}: mean {use.mean:.0%}, peak {use.peak:.0%}  {_sparkline(use.course)}")
    if len(kv) > _MOST_INSTANCES:
        console.print(f"  the fullest of {len(kv)} pools; mean of all {_mean([use.mean for use in kv]):.0%}")


def _peak(use: KvUse) -> float:
    return use.peak


def _prompts(tokens: PromptTokens) -> str:
    counts = (
        (tokens.cached, "cached"),
        (tokens.pulled, "pulled"),
        (tokens.from_host, "read from host memory"),
        (tokens.loaded, "read from disk"),
    )
    found = ", ".join(f"{count / tokens.total:.1%} {how}" for count, how in counts if count)
    return f"prompt tokens  {tokens.computed / tokens.total:.1%} computed, {found}"


def _latencies(runs: Sequence[RunReport]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("ms", "mean", "P50", "P90", "P99"):
        table.add_column(heading, justify="left" if heading == "ms" else "right")
    getters: dict[str, Callable[[RunReport], Percentiles]] = {
        "TTFT": lambda run: run.ttft,
        "TPOT": lambda run: run.tpot,
        "ITL": lambda run: run.itl,
        "E2E": lambda run: run.e2e,
    }
    for name, get in getters.items():
        rows = [get(run) for run in runs]
        values = [_mean([getattr(row, field) for row in rows]) for field in ("mean", "p50", "p90", "p99")]
        table.add_row(name, *(f"{value * 1e3:.1f}" for value in values))
    return table


def _attainment(report: SimulationReport) -> str:
    estimate, slo = report.attainment, report.slo
    interval = "" if math.isnan(estimate.half_width) else f" ± {estimate.half_width:.1%}"
    limits = [f"{name} <= {limit * 1e3:g} ms" for name, limit in (("TTFT", slo.ttft_s), ("TPOT", slo.tpot_s))]
    alone = [_mean([getattr(run, name) for run in report.runs]) for name in ("ttft_attainment", "tpot_attainment")]
    told = " and ".join(f"{limit} ({part:.1%} alone)" for limit, part in zip(limits, alone, strict=True))
    outcome = f"missed, {', '.join(report.missed)}" if report.missed else "kept"
    return f"\nattainment  [bold]{estimate.mean:.1%}[/]{interval} of {told}\ntarget  {_target(report)}: {outcome}"


def _target(report: SimulationReport) -> SloTarget:
    return SloTarget(slo=report.slo, attainment=report.attainment_target, tails=report.tails)


def _stages(runs: Sequence[RunReport]) -> str:
    shares = {stage: _mean([run.stage_shares[stage] for run in runs]) for stage in runs[0].stage_shares}
    told = ", ".join(f"{stage.replace('_', ' ')} {share:.1%}" for stage, share in shares.items() if share >= 5e-4)
    return f"time spent  {told}"


def _paths(paths: PathUse) -> str:
    return (
        f"paths by prediction  {paths.leaning_share:.0%} of prompt tokens prefilled against the roles; predictions off "
        f"by {paths.ttft_error:.0%} of TTFT, {paths.tpot_error:.0%} of TPOT; "
        f"mean regret {paths.ttft_regret_s * 1e3:.0f} ms of TTFT, {paths.tpot_regret_s * 1e3:.1f} ms of TPOT"
    )


def _sparkline(course: Sequence[float], width: int = 36) -> str:
    """Return the course of a fraction as blocks; each is the peak of its part."""
    if not course:
        return ""
    step = max(1, math.ceil(len(course) / width))
    peaks = [max(course[start : start + step]) for start in range(0, len(course), step)]
    return "".join(" ▁▂▃▄▅▆▇█"[min(8, math.ceil(peak * 8))] for peak in peaks)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
