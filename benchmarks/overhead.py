"""What serving costs beside the forward pass: ``python benchmarks/overhead.py``.

Outside the instances: CPU time of the server process (HTTP, tokenising, router), for each streamed token, while a load
client reads 1 to 32 answers of one instance that has a core of its own. Inside: CPU time of the loop's thread in a turn
less that in the decoder's forward pass: messages, scheduler, batch building, sampling, outputs. What plays the router
works between the turns, and is not counted. The sequences begin new KV blocks one after the other, as in service.
"""

import argparse
import enum
import gc
import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
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
SAMPLINGS = {"greedy": 0.0, "sampled": 1.0}
SETTLE_S = 3.0


class Side(enum.StrEnum):
    """Whose work is measured: the server's or the instance's."""

    OUTSIDE = "outside"
    INSIDE = "inside"


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure, and how to print it."""

    only: Side | None
    sampling: Sequence[str]
    batch_sizes: Sequence[int]
    steps: int
    repeats: int
    json: bool


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


def measure_outside(options: Options) -> dict[int, float]:
    """Start a server with one instance and return the mean for each number of streams."""
    with tempfile.TemporaryDirectory() as folder:
        with running(serve_command("server", ("--colocated", "1")), Path(folder) / "log") as server:
            time.sleep(SETTLE_S)
            return {size: fmean(outside(size, server) for _ in range(options.repeats)) for size in options.batch_sizes}


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


def measure_inside(options: Options, temperature: float) -> dict[int, float]:
    """Return the median CPU seconds of a turn beside its forward pass, by batch size."""
    forwards_s: dict[int, list[float]] = {size: [] for size in options.batch_sizes}
    forward = Decoder.forward

    def timed(decoder: Decoder, batch: StepBatch, kv_layers: Sequence[torch.Tensor]) -> torch.Tensor:
        started_s = time.thread_time()
        logits = forward(decoder, batch, kv_layers)
        forwards_s.setdefault(len(batch.token_ids), []).append(time.thread_time() - started_s)
        return logits

    scripts = [
        Script(
            decode_contexts=tuple(range(PROMPT_LEN, PROMPT_LEN + size)),
            num_decode_steps=options.steps,
            temperature=temperature,
        )
        for size in options.batch_sizes
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
        gc.collect()
        gc.freeze()  # as in service
        with torch.inference_mode():
            loop.run()
    found: dict[int, float] = {}
    for size, result in zip(options.batch_sizes, channel.results, strict=True):
        turns = result.decode_steps
        passes_s = forwards_s[size][-len(turns) :]  # the last ones: each turn less its own, whatever the machine does
        found[size] = median(turn.time_s * turn.on_core - pass_s for turn, pass_s in zip(turns, passes_s, strict=True))
    return found


def parse() -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=Side, choices=list(Side), help="one side; both take ten minutes")
    parser.add_argument("--sampling", nargs="+", choices=SAMPLINGS, default=list(SAMPLINGS), help="of steps inside")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=list(BATCH_SIZES), metavar="N")
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="of each batch size inside (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=NUM_REPEATS, help="of each load outside (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON: microseconds by column and size")
    return Options(**vars(parser.parse_args()))


def main() -> None:
    """Measure and print."""
    options = parse()
    keep_freed_memory()
    torch.set_num_threads(1)
    columns: dict[str, dict[int, float]] = {}
    if options.only is not Side.INSIDE:
        columns["server process, us a token"] = measure_outside(options)
    for name in options.sampling if options.only is not Side.OUTSIDE else ():
        columns[f"instance, us a step, {name}"] = measure_inside(options, SAMPLINGS[name])
    if options.json:
        shown = {name: {size: round(one_s * 1e6) for size, one_s in column.items()} for name, column in columns.items()}
        print(json.dumps(shown))
        return
    drawn = Table(title="beside the forward pass")
    for heading in ("sequences", *columns):
        drawn.add_column(heading, justify="right")
    for size in options.batch_sizes:
        drawn.add_row(str(size), *(f"{column[size] * 1e6:.0f}" for column in columns.values()))
    Console(width=120).print(drawn)


if __name__ == "__main__":
    main()
