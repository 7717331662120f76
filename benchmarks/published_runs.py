"""The five runs that DistServe published, simulated: ``python benchmarks/published_runs.py [FOLDER]``.

FOLDER holds ``opt13b_sharegpt_a100_calibration.csv``. Prints predicted / measured percentiles and attainment; the range
of the pipeline's when arrivals move by a few milliseconds; its TPOT over time, beside what one batch or two equal ones
would take; what TPOTs are made of; and what the same prompt took on an idle engine in the two vLLM runs.
"""

import argparse
import csv
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
from msgspec import structs
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from disagg.base.config import InstanceGroup, Placement
from disagg.base.ids import RequestId
from disagg.base.request import Role
from disagg.costs.latency import StepShape
from disagg.costs.published import PublishedPlatform
from disagg.simulator.cluster import ClusterSpec, SimulatedCluster
from disagg.simulator.engines import DISTSERVE, VLLM_0_2_3, build_cluster
from disagg.simulator.request import SimulatedRequest

FOLDER: Final = Path("../shared/data/distserve")
FILE: Final = "opt13b_sharegpt_a100_calibration.csv"
MODEL: Final = "facebook/opt-13b"
PIPELINE: Final = "distserve-c21d12-600-6"
TTFT_MS, TPOT_MS = 250.0, 100.0
JITTERS, JITTER_S = 8, 0.01
WINDOW_S: Final = 10.0


@dataclass(frozen=True)
class Latencies:
    """Milliseconds of each request, in order; NaN where an answer has one token."""

    ttft: NDArray[np.float64]
    tpot: NDArray[np.float64]

    def attainment(self) -> float:
        """Return the percentage that keeps both objectives."""
        return 100 * float(np.mean((self.ttft <= TTFT_MS) & ~(self.tpot > TPOT_MS)))


Row = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER, help=f"default: {FOLDER}")
    runs = read_runs(parser.parse_args().folder / FILE)
    console = Console(width=120)
    began_s = time.process_time()
    console.print(percentiles(runs))
    per_s = sum(map(len, runs.values())) / (time.process_time() - began_s)
    console.print(f"{per_s:,.0f} requests of these runs are simulated in a second of one core")
    console.print(spread(runs[PIPELINE]))
    console.print(over_time(runs[PIPELINE]))
    console.print(parts({run: rows for run, rows in runs.items() if run != PIPELINE}))
    console.print(cold(runs))


def read_runs(path: Path) -> dict[str, list[Row]]:
    """Return the requests of each run."""
    runs: dict[str, list[Row]] = {}
    with path.open(encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            runs.setdefault(row["run"], []).append({key: float(text) for key, text in row.items() if key != "run"})
    return runs


def spec_of(run: str, fixed_batches: bool = True) -> ClusterSpec:
    """Return the deployment that a run's name tells: engine[-placement]-requests-rate."""
    if run.startswith("vllm"):
        groups = (InstanceGroup(role=Role.COLOCATED, count=1),)
        return build_cluster(Placement(groups=groups), PublishedPlatform("vllm-0.2.3", MODEL), VLLM_0_2_3)
    _, prefill_tp, prefill_pp, _, decode_tp, decode_pp = run.split("-")[1]
    sizes = ((Role.PREFILL, prefill_tp, prefill_pp), (Role.DECODE, decode_tp, decode_pp))
    groups = tuple(
        InstanceGroup(role=role, count=1, tensor_parallel=int(tensor), pipeline_parallel=int(pipeline))
        for role, tensor, pipeline in sizes
    )
    schedulers = {
        role: structs.replace(settings, fixed_batches=fixed_batches) for role, settings in DISTSERVE.schedulers.items()
    }
    rules = replace(DISTSERVE, schedulers=schedulers)
    return build_cluster(Placement(groups=groups), PublishedPlatform("distserve", MODEL), rules)


def simulate(spec: ClusterSpec, rows: Sequence[Row], jitter: random.Random | None = None) -> Latencies:
    """Return what the simulator makes of a run, each arrival up to ``JITTER_S`` later."""
    requests = [
        SimulatedRequest(
            RequestId(f"r{number}"),
            row["arrival_s"] + (jitter.uniform(0, JITTER_S) if jitter else 0.0),
            int(row["prompt_len"]),
            int(row["output_len"]),
        )
        for number, row in enumerate(rows)
    ]
    SimulatedCluster(spec, lambda request: None).run(sorted(requests, key=lambda request: request.arrival_s))
    return Latencies(
        np.array([request.ttft_s for request in requests]) * 1e3,
        np.array([request.tpot_s for request in requests]) * 1e3,
    )


def measured(rows: Sequence[Row]) -> Latencies:
    """Return what the authors measured."""
    return Latencies(np.array([row["ttft_ms"] for row in rows]), np.array([row["tpot_ms"] for row in rows]))


def percentiles(runs: dict[str, list[Row]]) -> Table:
    """Return a row for each run."""
    table = Table(title="Predicted / measured, ms", title_justify="left")
    table.add_column("run", no_wrap=True)
    for heading in ("TTFT P50", "TTFT P90", "TPOT P50", "TPOT P90", "attainment", "mean error of a TPOT"):
        table.add_column(heading)
    for run, rows in runs.items():
        predicted, real = simulate(spec_of(run), rows), measured(rows)
        cells = [
            _compare(float(np.nanpercentile(ours, percent)), float(np.percentile(theirs, percent)))
            for ours, theirs in ((predicted.ttft, real.ttft), (predicted.tpot, real.tpot))
            for percent in (50, 90)
        ]
        long = np.array([row["output_len"] >= 10 for row in rows])
        error = np.mean(np.abs(predicted.tpot[long] / real.tpot[long] - 1))
        attained = f"{predicted.attainment():.1f} / {real.attainment():.1f}%"
        table.add_row(run, *cells, attained, f"{100 * error:.1f}%")
    return table


def _compare(predicted: float, real: float) -> str:
    return f"{predicted:.1f} / {real:.1f} ({100 * (predicted / real - 1):+.0f}%)"


def spread(rows: Sequence[Row]) -> str:
    """Return the range of the pipeline's TPOT over small changes of the arrivals."""
    found = [simulate(spec_of(PIPELINE), rows, random.Random(seed)).tpot for seed in range(JITTERS)]
    evenly = simulate(spec_of(PIPELINE, fixed_batches=False), rows).tpot
    told = []
    for percent in (50, 90):
        values = [float(np.nanpercentile(tpot, percent)) for tpot in found]
        real = float(np.percentile(measured(rows).tpot, percent))
        told.append(
            f"TPOT P{percent} {min(values):.0f} to {max(values):.0f} ms, mean {np.mean(values):.1f} "
            f"(measured {real:.1f}; with batches shared evenly {np.nanpercentile(evenly, percent):.1f})"
        )
    return f"{PIPELINE}, {JITTERS} times with arrivals up to {1e3 * JITTER_S:.0f} ms later: {'; '.join(told)}\n"


def over_time(rows: Sequence[Row]) -> Table:
    """Return measured TPOT by arrival, and what a token takes if one batch holds all, or two hold half each."""
    table = Table(title=f"{PIPELINE}: measured TPOT by arrival, ms", title_justify="left")
    for heading in ("arrival, s", "running", "context", "TPOT", "all in one batch", "two equal batches"):
        table.add_column(heading, justify="right")
    latency = PublishedPlatform("distserve", MODEL).latency(1, 2)
    last_s = max(row["arrival_s"] for row in rows)
    for start_s in np.arange(0.0, last_s - WINDOW_S / 2, WINDOW_S):
        now = start_s + WINDOW_S / 2
        running = [row for row in rows if _starts_s(row) <= now < row["arrival_s"] + row["latency_ms"] / 1e3]
        context = sum(row["prompt_len"] + _done(row, now) for row in running)
        tpots = [
            row["tpot_ms"] for row in rows if 0 <= row["arrival_s"] - start_s < WINDOW_S and row["output_len"] >= 10
        ]
        whole = StepShape(num_decodes=len(running), decode_context=int(context), num_samples=len(running))
        half = StepShape(num_decodes=len(running) // 2, decode_context=int(context / 2), num_samples=len(running) // 2)
        one_s, two_s = sum(latency.stage_times_s(whole)), 2 * max(latency.stage_times_s(half))
        cells = (len(running), round(context), np.mean(tpots), 1e3 * one_s, 1e3 * two_s)
        table.add_row(f"{start_s:.0f} to {start_s + WINDOW_S:.0f}", *(f"{cell:.0f}" for cell in cells))
    return table


def _starts_s(row: Row) -> float:
    return row["arrival_s"] + row["ttft_ms"] / 1e3


def _done(row: Row, now: float) -> float:
    return (now - _starts_s(row)) * 1e3 / row["tpot_ms"]


def parts(runs: dict[str, list[Row]]) -> Table:
    """Return what TPOTs are made of, measured and predicted, by least squares on the relative error."""
    table = Table(title="Parts of a TPOT, ms", title_justify="left")
    table.add_column("run", no_wrap=True)
    for heading in ("fixed", "a sequence", "1,000 tokens of context", "a prompt that came", "its token", "error"):
        table.add_column(heading, justify="right")
    for run, rows in runs.items():
        for name, told in ((run, rows), ("  predicted", as_rows(simulate(spec_of(run), rows), rows))):
            # A DistServe answer waits for its own hand-over, a vLLM answer begins after its own prefill.
            found, error = _fit(told, counts_own=run.startswith("distserve"))
            table.add_row(name, *(f"{value:.3g}" for value in found * [1, 1, 1000, 1, 1]), f"{100 * error:.1f}%")
    return table


def as_rows(latencies: Latencies, rows: Sequence[Row]) -> list[Row]:
    """Return the rows with these latencies in place of theirs."""
    return [
        {**row, "ttft_ms": ttft, "tpot_ms": tpot, "latency_ms": ttft + (row["output_len"] - 1) * tpot}
        for row, ttft, tpot in zip(rows, latencies.ttft, np.nan_to_num(latencies.tpot), strict=True)
    ]


def _fit(rows: Sequence[Row], *, counts_own: bool) -> tuple[NDArray[np.float64], float]:
    """Return the milliseconds of each feature of ``_met``, and the mean error."""
    long = [row for row in rows if row["output_len"] >= 10]
    matrix = np.array([_met(row, rows, counts_own=counts_own) for row in long])
    tpots = np.array([row["tpot_ms"] for row in long])
    found, *_ = np.linalg.lstsq(matrix / tpots[:, None], np.ones(len(tpots)), rcond=None)
    return found, float(np.mean(np.abs(matrix @ found / tpots - 1)))


def _met(row: Row, rows: Sequence[Row], *, counts_own: bool) -> tuple[float, ...]:
    """Return 1, the mean number of running answers and of their tokens, and prompts and their tokens for each token."""
    start_s, end_s = _starts_s(row), row["arrival_s"] + row["latency_ms"] / 1e3
    running = context = num_prompts = num_tokens = 0.0
    for other in rows:
        first_s, last_s = _starts_s(other), other["arrival_s"] + other["latency_ms"] / 1e3
        shared_s = min(end_s, last_s) - max(start_s, first_s)
        if other["output_len"] > 1 and shared_s > 0:
            share = shared_s / (end_s - start_s)
            middle_s = (min(end_s, last_s) + max(start_s, first_s)) / 2
            running += share
            context += share * (other["prompt_len"] + _done(other, middle_s))
        if start_s <= first_s < end_s and (counts_own or other is not row):
            num_prompts += 1
            num_tokens += other["prompt_len"]
    num_gaps = row["output_len"] - 1
    return 1.0, running, context, num_prompts / num_gaps, num_tokens / num_gaps


def cold(runs: dict[str, list[Row]]) -> str:
    """Return how long the first prompts took on an idle vLLM, in both of its runs."""
    slow, fast = (runs[run][1] for run in ("vllm-200-2", "vllm-100-1"))
    return (
        f"A prompt of {slow['prompt_len']:.0f} tokens on an idle vLLM took {fast['ttft_ms']:.0f} ms in the run at "
        f"1 request/s, {slow['ttft_ms']:.0f} ms in that at 2"
    )


if __name__ == "__main__":
    main()
