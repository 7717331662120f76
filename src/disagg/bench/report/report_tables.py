"""The tables of a report: figures beside the first system's, what was set, and the client's own part."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from disagg.bench.report.runs import GoodputResult, RunGroup, SystemRun, systems_of
from disagg.bench.report.words import milliseconds, number, percent, ratio, seconds
from disagg.measure.slo import Slo
from disagg.measure.statistics import Percentiles

LATE_CLIENT_S = 0.005
"""From this 99th percentile of lateness on, the report warns that the client was late."""


@dataclass(frozen=True)
class Cell:
    """A value, and below it what it is relative to the first system or how sure it is."""

    text: str
    note: str = ""


@dataclass(frozen=True)
class HeadlineRow:
    """One system under one load."""

    system: str
    load: str
    is_reference: bool
    cells: tuple[Cell, ...]


HEADLINE_COLUMNS = (
    *("P50", "P90", "P99") * 3,
    *("SLO attainment", "finished", "output tokens/s", "good requests/s per device"),
)
"""Percentiles of TTFT, TPOT and ITL in ms, then the rest."""


def headline(groups: Sequence[RunGroup]) -> list[HeadlineRow]:
    """Return the rows, those of equal load together and compared with the first system that was run under it."""
    rows: list[HeadlineRow] = []
    for load in dict.fromkeys(str(group.load) for group in groups):
        under_load = [group for group in groups if str(group.load) == load]
        reference = under_load[0]
        rows += [HeadlineRow(group.system, load, group is reference, _cells(group, reference)) for group in under_load]
    return rows


def goodput_rows(results: Sequence[GoodputResult]) -> list[tuple[str, Cell, Cell]]:
    """Return system, goodput in all and goodput per device, the latter beside the first system's."""
    rows = []
    for result in results:
        interval = f"± {number(result.rate.half_width)}" if result.rate.half_width >= 0 else ""
        versus = "" if result is results[0] else ratio(result.per_device, results[0].per_device)
        rows.append((result.system, Cell(number(result.rate.mean), interval), Cell(number(result.per_device), versus)))
    return rows


def settings_blocks(runs: Sequence[SystemRun]) -> list[tuple[str, dict[str, str]]]:
    """Return what was set, label by label: first what all systems have in common, then what is each one's own."""
    systems = systems_of(runs)
    own = {system: _settings_of([run for run in runs if run.system == system]) for system in systems}
    first = own[systems[0]]
    common = {label: value for label, value in first.items() if all(one.get(label) == value for one in own.values())}
    if len(systems) == 1:
        return [(systems[0], first)]
    blocks = [("All systems", common)]
    for system, settings in own.items():
        blocks.append((system, {label: value for label, value in settings.items() if label not in common}))
    return [block for block in blocks if block[1]]


def _settings_of(runs: Sequence[SystemRun]) -> dict[str, str]:
    seeds = sorted({run.seed for run in runs})
    return {
        **runs[0].settings,
        "Devices": str(runs[0].num_devices),
        "Seeds": ", ".join(map(str, seeds)),
    }


def machine_facts(runs: Iterable[SystemRun]) -> list[dict[str, str]]:
    """Return the facts of each machine on which something ran, once."""
    facts = [run.machine.facts() for run in runs if run.machine is not None]
    return [fact for index, fact in enumerate(facts) if fact not in facts[:index]]


@dataclass(frozen=True)
class ClientRow:
    """The load client's own part in one system's runs under one load."""

    system: str
    load: str
    num_runs: int
    num_requests: int
    lateness_p50: str
    lateness_p99: str
    cpu: str
    """Of one core."""
    other_cpu: str
    """Of one core, by everything that is neither client nor server."""
    failures: str
    notes: tuple[str, ...]
    is_late: bool
    is_disturbed: bool


def client_rows(groups: Sequence[RunGroup]) -> list[ClientRow]:
    """Return how late the client was and what it used, and which requests did not end well."""
    rows = []
    for group in groups:
        cores = [run.client_cores for run in group.runs]
        other_cores = [run.other_cores for run in group.runs]
        failures = ", ".join(f"{count} × {kind}" for kind, count in sorted(group.errors.items()))
        rows.append(
            ClientRow(
                system=group.system,
                load=str(group.load),
                num_runs=len(group.runs),
                num_requests=sum(len(run.records) for run in group.runs),
                lateness_p50=seconds(group.lateness.p50),
                lateness_p99=seconds(group.lateness.p99),
                cpu=percent(sum(cores) / len(cores)),
                other_cpu=percent(sum(other_cores) / len(other_cores)),
                notes=tuple(dict.fromkeys(note for run in group.runs for note in run.notes)),
                failures=failures or "none",
                is_disturbed=any(run.is_disturbed for run in group.runs),
                is_late=group.load.is_open_loop and group.lateness.p99 > LATE_CLIENT_S,
            )
        )
    return rows


def _cells(group: RunGroup, reference: RunGroup) -> tuple[Cell, ...]:
    def versus(value: float, of_reference: float) -> str:
        return "" if group is reference else ratio(value, of_reference)

    def latencies(own: Percentiles, its: Percentiles) -> list[Cell]:
        pairs = [(getattr(own, name), getattr(its, name)) for name in ("p50", "p90", "p99")]
        return [Cell(milliseconds(value), versus(value, other)) for value, other in pairs]

    has_slo = group.slo != Slo()
    kept = group.attainment()
    finished, tokens, good = (
        lambda run: run.num_finished / max(1, run.num_requests),
        lambda run: run.output_tokens_per_s,
        lambda run: run.good_rate,
    )
    good_rate, its_good_rate = group.mean(good) / group.num_devices, reference.mean(good) / reference.num_devices
    return (
        *latencies(group.ttft, reference.ttft),
        *latencies(group.tpot, reference.tpot),
        *latencies(group.itl, reference.itl),
        Cell(percent(kept.share), f"{percent(kept.low)[:-2]}–{percent(kept.high)}") if has_slo else Cell("–"),
        Cell(percent(group.mean(finished))),
        Cell(number(group.mean(tokens)), versus(group.mean(tokens), reference.mean(tokens))),
        Cell(number(good_rate), versus(good_rate, its_good_rate)) if has_slo else Cell("–"),
    )
