"""The five runs that DistServe published, simulated: ``python benchmarks/published_runs.py [FOLDER]``.

FOLDER holds ``opt13b_sharegpt_a100_calibration.csv``. Prints predicted / measured percentiles and attainment; the range
of the pipeline's when arrivals move by a few milliseconds; its TPOT over time, beside what one batch or two equal ones
would take; and what the same prompt took on an idle engine in the two vLLM runs.
"""

import argparse
import csv
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
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
    console.print(percentiles(runs))
    console.print(spread(runs[PIPELINE]))
    console.print(over_time(runs[PIPELINE]))
    console.print(cold(runs))


def read_runs(path: Path) -> dict[str, list[Row]]:
    """Return the requests of each run."""
    runs: dict[str, list[Row]] = {}
    with path.open(encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            runs.setdefault(row["run"], []).append({key: float(text) for key, text in row.items() if key != "run"})
    return runs


def spec_of(run: str) -> ClusterSpec:
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
    return build_cluster(Placement(groups=groups), PublishedPlatform("distserve", MODEL), DISTSERVE)


def simulate(run: str, rows: Sequence[Row], jitter: random.Random | None = None) -> Latencies:
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
    SimulatedCluster(spec_of(run), lambda request: None).run(sorted(requests, key=lambda request: request.arrival_s))
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
        predicted, real = simulate(run, rows), measured(rows)
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
    found = [simulate(PIPELINE, rows, random.Random(seed)).tpot for seed in range(JITTERS)]
    parts = []
    for percent in (50, 90):
        values = [float(np.nanpercentile(tpot, percent)) for tpot in found]
        real = float(np.percentile(measured(rows).tpot, percent))
        parts.append(
            f"TPOT P{percent} {min(values):.0f} to {max(values):.0f} ms, mean {np.mean(values):.1f} "
            f"(measured {real:.1f})"
        )
    return f"{PIPELINE}, {JITTERS} times with arrivals up to {1e3 * JITTER_S:.0f} ms later: {'; '.join(parts)}\n"


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


def cold(runs: dict[str, list[Row]]) -> str:
    """Return how long the first prompts took on an idle vLLM, in both of its runs."""
    slow, fast = (runs[run][1] for run in ("vllm-200-2", "vllm-100-1"))
    return (
        f"A prompt of {slow['prompt_len']:.0f} tokens on an idle vLLM took {fast['ttft_ms']:.0f} ms in the run at "
        f"1 request/s, {slow['ttft_ms']:.0f} ms in that at 2"
    )


if __name__ == "__main__":
    main()
