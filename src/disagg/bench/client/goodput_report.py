"""What a search for the goodput says, and the same for ``disagg bench report``."""

import math
from collections import Counter
from pathlib import Path

import msgspec

from disagg.bench.client.goodput import GoodputFound, GoodputPlan, Trial
from disagg.bench.client.run_load import LoadResult
from disagg.bench.report.runs import GoodputResult, Load, SystemRun
from disagg.bench.report.saved import write_results
from disagg.measure.machine import this_machine
from disagg.measure.record import Ending
from disagg.measure.slo import Slo, Tail
from disagg.measure.statistics import Estimate, Percentiles, Share


class RatePoint(msgspec.Struct, frozen=True, kw_only=True):
    """All runs at one rate: a point of the curve of attainment against rate.

    ``is_cut``: given up early; then the attainment is a lower bound, and latencies are of what finished.
    """

    rate: float
    attainment: Share
    is_met: bool
    missed: tuple[str, ...]
    """What of the target was not kept, in words."""
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
    tails: tuple[Tail, ...]
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
    server, slo = asked.plan.server, asked.target.slo
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
        target=asked.target.attainment,
        tails=asked.target.tails,
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
        missed=trial.missed,
        is_cut=trial.is_cut,
        num_runs=len(trial.results),
        errors=dict(Counter(record.error or record.ending.value for record in failed)),
        ttft=Percentiles.of([record.ttft_s for record in finished]),
        tpot=Percentiles.of([record.tpot_s for record in finished]),
        client_cores=max(result.client_cores for result in trial.results),
        lateness_p99_s=Percentiles.of([record.lateness_s for record in records]).p99,
        stopped=tuple(result.stopped for result in trial.results if result.stopped),
    )


def save_search(path: Path, report: GoodputReport, found: GoodputFound, name: str) -> None:
    """Write all runs and the goodput for ``disagg bench report``; raise ConfigurationError when that fails."""
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
