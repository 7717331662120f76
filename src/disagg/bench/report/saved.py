"""Runs in files: one JSON file that says what was run and found, and beside it the records of each run as JSONL."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from disagg.base.errors import ConfigurationError
from disagg.base.structs import read_struct
from disagg.bench.report.runs import GoodputResult, Load, SystemRun
from disagg.measure.machine import Machine
from disagg.measure.record import read_records, write_records
from disagg.measure.slo import Slo
from disagg.measure.statistics import Estimate

FORMAT: Final = "disagg-results-1"


class _SavedRun(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A run but for its records. JSON knows neither NaN nor infinity: they are left out."""

    system: str
    workload: str
    records: str
    """File name, beside this file."""
    seed: int
    num_devices: int
    rate: float | None = None
    num_users: int = 0
    prompt_len: int = 0
    slo_ttft_s: float | None = None
    slo_tpot_s: float | None = None
    settings: dict[str, str] = {}
    machine: Machine | None = None
    client_cores: float | None = None
    other_cores: float | None = None
    notes: tuple[str, ...] = ()


class _SavedGoodput(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    system: str
    workload: str
    num_devices: int
    target: float
    rate: float
    half_width: float | None = None


class _SavedResults(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: str
    runs: tuple[_SavedRun, ...]
    goodput: tuple[_SavedGoodput, ...] = ()


@dataclass(frozen=True)
class Results:
    """What a file holds."""

    runs: tuple[SystemRun, ...]
    goodput: tuple[GoodputResult, ...] = ()


def write_results(path: Path, runs: Sequence[SystemRun], goodput: Sequence[GoodputResult] = ()) -> None:
    """Write ``path`` and, beside it, ``<stem>-<number>.jsonl`` for each run; make the folder if need be.

    Raises ConfigurationError when that is not possible.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"cannot make the folder {path.parent}: {error.strerror}") from error
    saved: list[_SavedRun] = []
    names: dict[int, str] = {}
    for run in runs:
        # One run may be judged by several objectives; its records are written once.
        name = names.setdefault(id(run.records), f"{path.stem}-{len(names):03}.jsonl")
        if all(name != earlier.records for earlier in saved):
            write_records(run.records, path.parent / name)
        saved.append(_saved_run(run, name))
    results = _SavedResults(format=FORMAT, runs=tuple(saved), goodput=tuple(_saved_goodput(one) for one in goodput))
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n")
    except OSError as error:
        raise ConfigurationError(f"cannot write the results {path}: {error.strerror}") from error


def read_results(path: Path) -> Results:
    """Read what ``write_results`` wrote; raise ConfigurationError, naming the place, when it is something else."""
    try:
        saved = read_struct(msgspec.json.decode(path.read_bytes()), _SavedResults)
    except OSError as error:
        raise ConfigurationError(f"cannot read the results {path}: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ConfigurationError) as error:
        raise ConfigurationError(f"{path} holds no saved results: {error}") from error
    if saved.format != FORMAT:
        raise ConfigurationError(f"{path} is of the format {saved.format!r}; this version reads {FORMAT!r}")
    return Results(
        runs=tuple(_system_run(run, path.parent) for run in saved.runs),
        goodput=tuple(_goodput_result(one) for one in saved.goodput),
    )


def _saved_run(run: SystemRun, records: str) -> _SavedRun:
    return _SavedRun(
        system=run.system,
        workload=run.workload,
        records=records,
        seed=run.seed,
        num_devices=run.num_devices,
        rate=_finite(run.load.rate),
        num_users=run.load.num_users,
        prompt_len=run.load.prompt_len,
        slo_ttft_s=_finite(run.slo.ttft_s),
        slo_tpot_s=_finite(run.slo.tpot_s),
        settings=run.settings,
        machine=run.machine,
        client_cores=_finite(run.client_cores),
        other_cores=_finite(run.other_cores),
        notes=run.notes,
    )


def _system_run(saved: _SavedRun, folder: Path) -> SystemRun:
    return SystemRun(
        system=saved.system,
        workload=saved.workload,
        load=Load(rate=_or(saved.rate, math.nan), num_users=saved.num_users, prompt_len=saved.prompt_len),
        seed=saved.seed,
        num_devices=saved.num_devices,
        slo=Slo(ttft_s=_or(saved.slo_ttft_s, math.inf), tpot_s=_or(saved.slo_tpot_s, math.inf)),
        records=tuple(read_records(folder / Path(saved.records).name)),
        settings=saved.settings,
        machine=saved.machine,
        client_cores=_or(saved.client_cores, math.nan),
        other_cores=_or(saved.other_cores, math.nan),
        notes=saved.notes,
    )


def _saved_goodput(result: GoodputResult) -> _SavedGoodput:
    return _SavedGoodput(
        system=result.system,
        workload=result.workload,
        num_devices=result.num_devices,
        target=result.target,
        rate=result.rate.mean,
        half_width=_finite(result.rate.half_width),
    )


def _goodput_result(saved: _SavedGoodput) -> GoodputResult:
    return GoodputResult(
        system=saved.system,
        workload=saved.workload,
        num_devices=saved.num_devices,
        target=saved.target,
        rate=Estimate(mean=saved.rate, half_width=_or(saved.half_width, math.nan)),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _or(value: float | None, missing: float) -> float:
    return missing if value is None else value
