"""A comparison as it goes: each system in turn on the same cores, the same runs for each, in alternating order."""

import dataclasses
import os
import shlex
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import psutil

from disagg.base.errors import DisaggError
from disagg.bench.client.load_plan import Server
from disagg.bench.client.progress import LoadProgress
from disagg.bench.client.prompt_texts import PromptSource
from disagg.bench.client.run_load import LoadResult, run_load
from disagg.bench.client.running import INTERRUPTED
from disagg.bench.compare.plan import (
    PlannedRun,
    median_latencies,
    needs_unloaded,
    objectives_of,
    plan_runs,
    unloaded_run,
)
from disagg.bench.compare.server_process import (
    OUR_READY,
    RunningServer,
    ServerCommand,
    free_port,
    our_arguments,
    running,
)
from disagg.bench.compare.spec import ComparisonSpec, SystemSpec, fill_in, split_command
from disagg.bench.report.runs import SystemRun
from disagg.measure.machine import this_machine
from disagg.measure.slo import Slo
from disagg.measure.summary import summarize


@dataclasses.dataclass(frozen=True, slots=True)
class ComparisonProgress:
    """Where a comparison is: of how many runs, and what is being done."""

    num_done: int
    num_runs: int
    words: str
    run: LoadProgress | None = None
    """Of the run under way."""


class Comparison:
    """Runs a comparison; ``runs`` yields them as they come. Logs of the servers go to ``logs``, a folder."""

    def __init__(
        self,
        spec: ComparisonSpec,
        source: PromptSource,
        logs: Path,
        watch: Callable[[ComparisonProgress], None] = lambda _: None,
    ) -> None:
        self._spec = spec
        self._source = source
        self._logs = logs
        self._watch = watch
        self._machine = this_machine()
        self._cores = sorted(os.sched_getaffinity(0))
        self._unloaded: dict[str, tuple[float, float]] = {}
        self._num_done = 0
        self._num_runs = spec.repeats * len(spec.systems) * len(plan_runs(spec, spec.seed))

    def runs(self) -> Generator[SystemRun]:
        """Yield every run, once for each of its objectives.

        Raises KeyboardInterrupt after Ctrl-C, UnavailableError when a system cannot be started. No process is left
        behind in any case.
        """
        before = os.sched_getaffinity(0)
        try:
            if self._spec.cpus.client:
                os.sched_setaffinity(0, self._spec.cpus.client)
            for repeat in range(self._spec.repeats):
                order = self._spec.systems if repeat % 2 == 0 else self._spec.systems[::-1]
                for system in order:
                    yield from self._runs_of(system, repeat)
        finally:
            os.sched_setaffinity(0, before)

    def _runs_of(self, system: SystemSpec, repeat: int) -> Iterator[SystemRun]:
        seed = self._spec.seed + repeat
        # Named even when they are all: the client may have been pinned to fewer.
        command = dataclasses.replace(make_command(system, self._spec, free_port()), cpus=tuple(self._server_cpus()))
        log = self._logs / f"{_file_name(system.name)}-{repeat}.log"
        self._tell(f"starting {system.name}")
        with running(command, log) as server:
            self._tell(f"letting {system.name} settle")
            time.sleep(self._spec.settle_s)
            for run in plan_runs(self._spec, seed):
                if needs_unloaded(run) and run.workload not in self._unloaded:
                    self._unloaded[run.workload] = self._measure_unloaded(server, run)
                yield from self._run(system, server, run, seed)
        if self._num_done < self._num_runs:
            self._tell("cooling down")
            time.sleep(self._spec.cool_down_s)

    def _measure_unloaded(self, server: RunningServer, run: PlannedRun) -> tuple[float, float]:
        """Return TTFT and TPOT of single requests. The first system is asked: all are judged by the same objectives."""
        result = self._load(server, unloaded_run(run), f"{server.command.name}: unloaded latencies")
        summary = summarize(result.records, Slo(), is_open_loop=False)
        return median_latencies(summary.ttft.p50, summary.tpot.p50, run.workload)

    def _run(self, system: SystemSpec, server: RunningServer, run: PlannedRun, seed: int) -> Iterator[SystemRun]:
        busy_s, own_s, started_s = _busy_s(), server.cpu_s() + time.process_time(), time.monotonic()
        result = self._load(server, run, f"{system.name}: {run.workload}, {run.load}")
        wall_s = time.monotonic() - started_s
        if server.process.poll() is not None:
            raise DisaggError(f"{system.name} ended with status {server.process.returncode} while it was measured")
        others_s = _busy_s() - busy_s - (server.cpu_s() + time.process_time() - own_s)
        settings = self._settings(server, result)
        self._num_done += 1
        notes = (
            *result.notes,
            *result.client_faults(),
            *([f"ended early: {result.stopped}"] if result.stopped else []),
        )
        for workload, slo in objectives_of(run, self._unloaded.get(run.workload, (0.0, 0.0))):
            yield SystemRun(
                system=system.name,
                workload=workload,
                load=run.load,
                seed=seed,
                num_devices=system.devices or len(self._server_cpus()),
                slo=slo,
                records=result.records,
                settings=settings,
                machine=self._machine,
                client_cores=result.client_cores,
                other_cores=max(0.0, others_s) / wall_s,
                notes=tuple(notes),
            )

    def _load(self, server: RunningServer, run: PlannedRun, words: str) -> LoadResult:
        self._tell(words)
        plan = run.load_plan(Server(server.command.url), self._spec)
        result = run_load(plan, self._source, lambda progress: self._tell(words, progress))
        if result.stopped == INTERRUPTED:
            raise KeyboardInterrupt
        return result

    def _settings(self, server: RunningServer, result: LoadResult) -> dict[str, str]:
        servers, client = self._server_cpus(), sorted(self._spec.cpus.client or self._cores)
        shared = " (shared with the server)" if set(servers) & set(client) else ""
        environment = " ".join(f"{name}={value}" for name, value in server.command.environment.items())
        settings = {
            "Command": shlex.join(server.command.arguments),
            "Environment": environment,
            "Model": result.model,
            "Cores of the server": ", ".join(map(str, servers)),
            "Cores of the client": ", ".join(map(str, client)) + shared,
            "Start to ready": f"{server.start_s:.1f} s",
            "Memory after the first run": f"{server.memory_bytes() / 2**30:.2f} GiB",
        }
        return {label: value for label, value in settings.items() if value}

    def _server_cpus(self) -> list[int]:
        return sorted(self._spec.cpus.servers or self._cores)

    def _tell(self, words: str, progress: LoadProgress | None = None) -> None:
        self._watch(ComparisonProgress(self._num_done, self._num_runs, words, progress))


def make_command(system: SystemSpec, spec: ComparisonSpec, port: int) -> ServerCommand:
    """Return how to start a system on ``port``. Raises ConfigurationError for a variable that is not set."""
    if system.command is not None:
        arguments = tuple(split_command(system.command, port))
        ready = system.ready
    else:
        flags = split_command(system.serve or "", port)
        model = [spec.model] if spec.model else []
        arguments = our_arguments([*model, *flags], port)
        ready = OUR_READY
    return ServerCommand(
        name=system.name,
        arguments=arguments,
        environment={name: fill_in(value, port) for name, value in system.environment.items()},
        url=fill_in(system.url, port),
        ready=ready,
        start_deadline_s=system.start_deadline_s,
    )


def _busy_s() -> float:
    """Return the CPU time that all cores have spent on anything so far."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq)


def _file_name(system: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in system)
