"""What the runs of one load say, and the same for ``disagg bench report``."""

from collections.abc import Sequence
from statistics import fmean

import msgspec

from disagg.bench.client.load_plan import ClosedLoad, OpenLoad, SessionLoad
from disagg.bench.client.run_load import LoadResult
from disagg.bench.report.runs import Load, SystemRun
from disagg.measure.machine import this_machine
from disagg.measure.slo import Slo, SloTarget
from disagg.measure.statistics import Estimate, Percentiles
from disagg.measure.summary import RunSummary, latency_percentiles, summarize


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
    target: SloTarget
    missed: tuple[str, ...]
    """What of the target was not kept by all runs together, in words; nothing where all was."""
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


def serve_report(workload: str, first_seed: int, results: Sequence[LoadResult], target: SloTarget) -> ServeReport:
    """Return what all runs of one load say, one for each seed from ``first_seed`` on."""
    runs = tuple(measured(result, first_seed + number) for number, result in enumerate(results))
    plan, summaries = results[0].plan, [run.summary for run in runs]
    records = [record for result in results for record in result.records]
    return ServeReport(
        url=plan.server.base_url,
        endpoint=plan.server.endpoint.value,
        model=results[0].model,
        workload=workload,
        load=_load_words(results[0], summaries),
        num_users=None if isinstance(plan.load, OpenLoad) else plan.load.num_users,
        slo=plan.limits.slo,
        target=target,
        missed=target.missed(
            sum(summary.attainment.count for summary in summaries) / max(1, len(records)), latency_percentiles(records)
        ),
        attainment=Estimate.of([summary.attainment.share for summary in summaries]),
        ttft_p50_s=Estimate.of([summary.ttft.p50 for summary in summaries]),
        tpot_p50_s=Estimate.of([summary.tpot.p50 for summary in summaries]),
        good_rate=Estimate.of([summary.good_rate for summary in summaries]),
        runs=runs,
    )


def system_runs(
    report: ServeReport, results: Sequence[LoadResult], *, rate: float, num_devices: int, name: str = ""
) -> list[SystemRun]:
    """Return the runs as ``disagg bench report`` takes them; ``rate`` is what was asked for, equal for all seeds."""
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
            return f"{fmean(summary.offered_rate for summary in summaries):.3g} requests/s"
        case ClosedLoad(num_users=num_users, think_s=think_s):
            return f"{num_users} users" + (f" who think {think_s:g} s" if think_s else "")
        case SessionLoad(num_users=num_users, sessions=sessions):
            at = "at their times" if num_users is None else f"of {num_users} users"
            return f"{len(sessions)} sessions {at}"
