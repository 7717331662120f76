"""What serving costs beside the forward pass: ``python benchmarks/overhead.py``.

Outside the instances: CPU time of the server process (HTTP, tokenising, router), for each streamed token, while a load
client reads 1 to 32 answers of one instance that has a core of its own. Inside: the time of a turn of the instance's
loop less that of the decoder's forward pass in it: messages, scheduler, batch building, sampling, outputs.
"""

import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import repeat
from pathlib import Path
from statistics import fmean, median
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table

from disagg.base.clock import MonotonicClock
from disagg.base.config import CacheSettings, InstanceSettings, ModelSettings, SchedulerSettings
from disagg.base.ids import InstanceId
from disagg.base.request import Role
from disagg.bench.client.load_plan import Asking, Limits, LoadPlan, OpenLoad, Server
from disagg.bench.client.prompt_source import load_prompt_source
from disagg.bench.client.run_load import run_load
from disagg.bench.compare.server_process import RunningServer, running, serve_command
from disagg.calibration.steps.channel import ScriptedChannel
from disagg.calibration.steps.script import Command, Report, RunScript, Script, ScriptResult
from disagg.engine.allocator import keep_freed_memory
from disagg.engine.instance import build_loop
from disagg.engine.kernels.interface import StepBatch
from disagg.engine.model.decoder import Decoder
from disagg.measure.workload import RequestSpec

BATCH_SIZES = (1, 4, 16, 32)
PROMPT_LEN, OUTPUT_LEN = 24, 256
NUM_STEPS = 200
NUM_REPEATS = 2
SETTLE_S = 3.0


def serving_s(num_streams: int, output_len: int, server: RunningServer) -> float:
    """Return the CPU seconds of the server process for so many answers streamed at once."""
    requests = (RequestSpec(PROMPT_LEN, output_len, arrival_s=0.0),) * num_streams
    plan = LoadPlan(
        server=Server(server.command.url), load=OpenLoad(requests), asking=Asking(temperature=0.0), limits=Limits()
    )
    before_s = server.own_cpu_s()
    run_load(plan, load_prompt_source())
    return server.own_cpu_s() - before_s


def outside(num_streams: int, server: RunningServer) -> float:
    """Return the CPU seconds of the server process for each token: what longer answers cost more than shorter ones."""
    short_s, long_s = (serving_s(num_streams, factor * OUTPUT_LEN, server) for factor in (1, 2))
    return (long_s - short_s) / (OUTPUT_LEN * num_streams)


def measure_outside() -> dict[int, float]:
    """Start a server with one instance and return the mean for each number of streams."""
    with tempfile.TemporaryDirectory() as folder:
        with running(serve_command("server", ("--colocated", "1")), Path(folder) / "log") as server:
            time.sleep(SETTLE_S)
            return {size: fmean(outside(size, server) for _ in range(NUM_REPEATS)) for size in BATCH_SIZES}


class Playing(ScriptedChannel):
    """Plays the scripts it is given, in this process."""

    def __init__(self, endpoint: str, scripts: Sequence[Script]) -> None:
        super().__init__(endpoint, InstanceId("overhead"), MonotonicClock())
        self._todo = list(scripts)
        self.results: list[ScriptResult] = []

    def _read_command(self) -> Command | None:
        return RunScript(script=self._todo.pop(0)) if self._todo else None

    def _answer(self, report: Report) -> None:
        if isinstance(report, ScriptResult):
            self.results.append(report)


def measure_inside(temperature: float) -> dict[int, float]:
    """Return the median seconds of a turn beside its forward pass, by batch size."""
    forwards_s: dict[int, list[float]] = {size: [] for size in BATCH_SIZES}
    forward = Decoder.forward

    def timed(decoder: Decoder, batch: StepBatch, kv_layers: Sequence[torch.Tensor]) -> torch.Tensor:
        started_s = time.perf_counter()
        logits = forward(decoder, batch, kv_layers)
        forwards_s.setdefault(len(batch.token_ids), []).append(time.perf_counter() - started_s)
        return logits

    scripts = [
        Script(decode_contexts=tuple(repeat(PROMPT_LEN, size)), num_decode_steps=NUM_STEPS, temperature=temperature)
        for size in BATCH_SIZES
    ]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack, patch.object(Decoder, "forward", timed):
        settings = InstanceSettings(
            instance=InstanceId("overhead"),
            role=Role.COLOCATED,
            control_endpoint=f"ipc://{folder}/control",
            model=ModelSettings(),
            cache=CacheSettings(),
            scheduler=SchedulerSettings(),
        )
        channel = Playing(settings.control_endpoint, scripts)
        stack.callback(channel.close)
        loop = build_loop(settings, channel, MonotonicClock(), stack, watch=channel.watch)
        with torch.inference_mode():
            loop.run()
    return {
        size: median(step.time_s for step in result.decode_steps) - median(forwards_s[size])
        for size, result in zip(BATCH_SIZES, channel.results, strict=True)
    }


def main() -> None:
    """Measure and print."""
    keep_freed_memory()
    torch.set_num_threads(1)
    columns = {
        "server process, us a token": {size: one * 1e6 for size, one in measure_outside().items()},
        "instance, us a step, greedy": {size: one * 1e6 for size, one in measure_inside(0.0).items()},
        "instance, us a step, sampled": {size: one * 1e6 for size, one in measure_inside(1.0).items()},
    }
    drawn = Table(title="beside the forward pass")
    for heading in ("sequences", *columns):
        drawn.add_column(heading, justify="right")
    for size in BATCH_SIZES:
        drawn.add_row(str(size), *(f"{column[size]:.0f}" for column in columns.values()))
    Console(width=120).print(drawn)


if __name__ == "__main__":
    main()
