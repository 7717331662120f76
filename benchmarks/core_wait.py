"""What serves, on whose core? ``python benchmarks/core_wait.py`` (Linux, two cores).

One prefill instance computes without pause; every few seconds a short prompt with a long answer makes the decode
instance begin to compute. Prints how long its thread then waits for its core in each step, as the kernel counts it, by
the time since it began. What waits beside it is API server, router, and this script's load client.
"""

import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

from background import repeated
from disagg.bench.client.load_plan import Asking, Limits, LoadPlan, OpenLoad, Server
from disagg.bench.client.prompt_source import load_prompt_source
from disagg.bench.client.run_load import LoadResult, run_load
from disagg.bench.compare.server_process import running, serve_command
from disagg.measure.workload import RequestSpec

NUM_ANSWERS, APART_S = 16, 2.5
ANSWER = (24, 120)
PROMPT, PROMPT_APART_S = (1500, 1), 0.85
BIN_S = 0.1
READING_S = 0.004
SETTLE_S = 3.0


def load() -> OpenLoad:
    """Return the prompts that keep the prefill instance busy, and the answers between them."""
    lasting_s = NUM_ANSWERS * APART_S
    prompts = [RequestSpec(*PROMPT, arrival_s=float(at_s)) for at_s in np.arange(0.0, lasting_s, PROMPT_APART_S)]
    answers = [RequestSpec(*ANSWER, arrival_s=1.0 + number * APART_S) for number in range(NUM_ANSWERS)]
    return OpenLoad(tuple(sorted(prompts + answers, key=lambda spec: spec.arrival_s)))


@contextmanager
def waits(pid: int) -> Iterator[list[tuple[float, float]]]:
    """Read in the background (time, seconds that the main thread of ``pid`` has waited for a core so far)."""
    readings: list[tuple[float, float]] = []
    with Path(f"/proc/{pid}/task/{pid}/schedstat").open("rb", buffering=0) as counts:

        def read() -> None:
            counts.seek(0)
            readings.append((time.time(), int(counts.read(100).split()[1]) / 1e9))

        with repeated(read, READING_S):
            yield readings


def by_time(result: LoadResult, readings: list[tuple[float, float]]) -> dict[int, list[float]]:
    """Return the seconds waited for each token after the second, by the tenth of a second since that one."""
    moments_s, waited_s = np.array(readings).T
    found: dict[int, list[float]] = defaultdict(list)
    for record in result.records:
        if record.max_output_len < ANSWER[1]:
            continue
        ends_s = np.array(record.event_s[1:]) + result.started_unix_s
        for gap_s, since_s in zip(np.diff(np.interp(ends_s, moments_s, waited_s)), ends_s[1:] - ends_s[0], strict=True):
            found[int(since_s / BIN_S)].append(float(gap_s))
    return found


def main() -> None:
    """Measure and print."""
    if len(os.sched_getaffinity(0)) != 2:
        raise SystemExit("this asks who shares two cores: run it under taskset -c 0,1")
    with tempfile.TemporaryDirectory() as folder:
        with running(serve_command("server", ("--prefill", "1", "--decode", "1")), Path(folder) / "log") as server:
            time.sleep(SETTLE_S)
            url = server.command.url
            instances = httpx.get(f"{url}/status").json()["instances"]
            pid = next(one["pid"] for one in instances if one["role"] == "decode")
            plan = LoadPlan(server=Server(url), load=load(), asking=Asking(temperature=0.0), limits=Limits())
            with waits(pid) as readings:
                result = run_load(plan, load_prompt_source())
    drawn = Table(title="a lone decode beside a busy prefill instance")
    for heading in ("s since it began", "steps", "ms a step it waits for its core"):
        drawn.add_column(heading, justify="right")
    for index, gaps_s in sorted(by_time(result, readings).items()):
        drawn.add_row(f"{index * BIN_S:.1f}", str(len(gaps_s)), f"{fmean(gaps_s) * 1e3:.2f}")
    Console(width=100).print(drawn)


if __name__ == "__main__":
    main()
