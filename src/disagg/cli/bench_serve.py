"""``disagg bench serve``: a workload sent to a running server, and what came back."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from disagg.base.errors import ConfigurationError
from disagg.bench.client.inquiries import num_instances
from disagg.bench.client.load_plan import Load, LoadPlan, load_of
from disagg.bench.client.load_report import ServeReport, serve_report, system_runs
from disagg.bench.client.parquet import check_parquet, write_parquet
from disagg.bench.client.prompt_source import load_prompt_source
from disagg.bench.client.run_load import LoadResult, run_load
from disagg.bench.client.running import INTERRUPTED
from disagg.cli.bench_load import (
    choose_plan,
    choose_slo,
    load_options,
    shown_progress,
)
from disagg.cli.bench_serve_report import print_report
from disagg.cli.values import Count, Number, OutputPath
from disagg.cli.workload_flags import WORKLOAD_HELP, choose_load, workload_options
from disagg.measure.record import write_records

_COUNT = Count(min=1)


@click.command(epilog=WORKLOAD_HELP)
@load_options
@workload_options
@click.option(
    "--users", "num_users", type=_COUNT, metavar="N", help="Closed loop: N users, each one request at a time."
)
@click.option("--think-s", type=Number(min=0), default=0.0, help="Wait of a user after each answer.")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Of the first run's workload.")
@click.option(
    "--seeds", type=_COUNT, default=1, show_default=True, metavar="K", help="Runs: one is a look, three make a claim."
)
@click.option("--max-run-s", type=Number(min=0, min_open=True), help="End a run after so many seconds.")
@click.option(
    "--records",
    type=OutputPath("the records"),
    metavar="FILE",
    help="Write what became of each request: .jsonl or .parquet.",
)
@click.option(
    "--save",
    type=OutputPath("the results", makes_folder=True),
    metavar="FILE.json",
    help="Write the runs for disagg bench report.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.pass_context
def serve(
    context: click.Context,
    /,
    seed: int,
    seeds: int,
    records: Path | None,
    save: Path | None,
    as_json: bool,
    **values: Any,
) -> None:
    """Send a workload to a server and measure what comes back: latencies, SLO attainment, throughput, failures.

    Requests are sent at their times, however slow the answers are (open loop), or by --users who wait for them (closed
    loop). What is refused, fails or does not finish counts as a miss.
    """
    if records is not None and records.suffix not in (".jsonl", ".parquet"):
        raise ConfigurationError(f"--records {records}: records are written as .jsonl or .parquet")
    if records is not None and records.suffix == ".parquet":
        check_parquet(records)
    target = choose_slo(values)
    plan = _with_deadline(choose_plan(values, target.slo), values["max_run_s"])
    name, rate, loads = choose_loads(values, range(seed, seed + seeds))
    source = load_prompt_source(values["tokenizer"], values["prompts"])
    results: list[LoadResult] = []
    for number, load in enumerate(loads):
        with shown_progress(f"run {number + 1} of {seeds}") as watch:
            results.append(run_load(dataclasses.replace(plan.numbered(number), load=load), source, watch))
        if results[-1].stopped == INTERRUPTED:
            break
    report = serve_report(name, seed, results, target)
    print_report(report, as_json)
    _write_records(report, results, records)
    if save is not None:
        from disagg.bench.report.saved import write_results

        num_devices = num_instances(plan.server) or 1
        write_results(save, system_runs(report, results, rate=rate, num_devices=num_devices, name=values["name"]))
    if not any(run.summary.num_finished for run in report.runs):
        context.exit(1)


def choose_loads(values: Mapping[str, Any], seeds: Sequence[int]) -> tuple[str, float, list[Load]]:
    """Return the workload's name, its rate in requests/s (NaN for a closed loop), and a load for each seed.

    Raises ConfigurationError when the flags contradict.
    """
    num_users = values["num_users"]
    if num_users is None:
        workload = choose_load(values)
    elif values["rate"] is not None or values["scale"] is not None:
        raise ConfigurationError("--users send when they have their answers: leave out --rate and --scale")
    else:
        # The times are not used, but drawn requests come with some.
        workload = choose_load({**values, "rate": 1.0})
    rate = math.nan if num_users is not None else workload.rate
    return workload.name, rate, [load_of(workload, seed, num_users, values["think_s"]) for seed in seeds]


def _with_deadline(plan: LoadPlan, max_run_s: float | None) -> LoadPlan:
    if max_run_s is None:
        return plan
    return dataclasses.replace(plan, limits=dataclasses.replace(plan.limits, deadline_s=max_run_s))


def _write_records(report: ServeReport, results: Sequence[LoadResult], path: Path | None) -> None:
    if path is None:
        return
    write = write_parquet if path.suffix == ".parquet" else write_records
    for run, result in zip(report.runs, results, strict=True):
        write(result.records, path if len(results) == 1 else path.with_stem(f"{path.stem}-seed{run.seed}"))
