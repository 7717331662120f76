"""What each system does beside the first one: ratios with intervals over repeats. Pure."""

import math
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from disagg.bench.report.runs import SystemRun, systems_of
from disagg.measure.statistics import Estimate


class Ratio(msgspec.Struct, frozen=True, kw_only=True):
    """A geometric mean of ratios, with its 95% interval; None where one repeat, or a missing value, tells nothing."""

    mean: float | None
    low: float | None = None
    high: float | None = None


class Value(msgspec.Struct, frozen=True, kw_only=True):
    """One figure of one system under one load: its mean over repeats, and beside the first system's."""

    metric: str
    unit: str
    """``s`` for seconds, ``share`` of 1, or what stands behind the number, if anything."""
    system: str
    mean: float | None
    ratio: Ratio | None = None
    """None for the first system itself."""


class LoadComparison(msgspec.Struct, frozen=True, kw_only=True):
    """All systems under one load."""

    workload: str
    load: str
    ttft_slo_s: float | None
    """Objectives; None where there is none."""
    tpot_slo_s: float | None
    systems: tuple[str, ...]
    values: tuple[tuple[Value, ...], ...]
    """By metric, then by system."""


Metric = tuple[str, str, Callable[[SystemRun], float]]

SLO_METRICS: Final = ("SLO attainment", "good requests/s per device")
"""Those that say nothing without objectives."""
METRICS: Final[tuple[Metric, ...]] = (
    ("TTFT P50", "s", lambda run: run.summary.ttft.p50),
    ("TTFT P99", "s", lambda run: run.summary.ttft.p99),
    ("TPOT P50", "s", lambda run: run.summary.tpot.p50),
    ("TPOT P99", "s", lambda run: run.summary.tpot.p99),
    ("ITL P99", "s", lambda run: run.summary.itl.p99),
    ("E2E P50", "s", lambda run: run.summary.e2e.p50),
    ("SLO attainment", "share", lambda run: run.summary.attainment.share),
    ("finished", "share", lambda run: run.summary.num_finished / max(1, run.summary.num_requests)),
    ("output", "tokens/s", lambda run: run.summary.output_tokens_per_s),
    ("good requests/s per device", "", lambda run: run.summary.good_rate / run.num_devices),
)


def compare(runs: Sequence[SystemRun]) -> list[LoadComparison]:
    """Return a comparison for each workload and load, in the order in which they first come."""
    systems = systems_of(runs)
    by_load: dict[tuple[str, str], list[SystemRun]] = {}
    for run in runs:
        by_load.setdefault((run.workload, str(run.load)), []).append(run)
    return [
        LoadComparison(
            workload=workload,
            load=load,
            ttft_slo_s=_finite(members[0].slo.ttft_s),
            tpot_slo_s=_finite(members[0].slo.tpot_s),
            systems=tuple(systems),
            values=tuple(
                tuple(_value(metric, system, systems[0], members) for system in systems) for metric in METRICS
            ),
        )
        for (workload, load), members in by_load.items()
    ]


def geometric_ratio(values: Sequence[float], references: Sequence[float]) -> Ratio:
    """Return the geometric mean of the ratios of pairs, and Student's 95% interval of it from two pairs on."""
    logarithms = [
        math.log(value / reference)
        for value, reference in zip(values, references, strict=True)
        if value > 0 and reference > 0
    ]
    if not logarithms:
        return Ratio(mean=None)
    estimate = Estimate.of(logarithms)
    if math.isnan(estimate.half_width):
        return Ratio(mean=math.exp(estimate.mean))
    low, high = estimate.mean - estimate.half_width, estimate.mean + estimate.half_width
    return Ratio(mean=math.exp(estimate.mean), low=math.exp(low), high=math.exp(min(high, 700.0)))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _value(metric: Metric, system: str, reference: str, runs: Sequence[SystemRun]) -> Value:
    name, unit, get = metric
    own = {run.seed: get(run) for run in runs if run.system == system}
    its = {run.seed: get(run) for run in runs if run.system == reference}
    known = [value for value in own.values() if not math.isnan(value)]
    seeds = sorted(own.keys() & its.keys())
    return Value(
        metric=name,
        unit=unit,
        system=system,
        mean=sum(known) / len(known) if known else None,
        ratio=None
        if system == reference
        else geometric_ratio([own[seed] for seed in seeds], [its[seed] for seed in seeds]),
    )
