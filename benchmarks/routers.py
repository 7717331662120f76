"""What routers cost: ``python benchmarks/routers.py --streams 10000 --routers 0,1,2``, on an idle machine.

Instances without a model speak the instance protocol: each has lanes of ``--batch`` sequences, and a lane emits one
token for each of its sequences every ``--interval-s``, at times that its tokens tell. A client opens ``--streams``
streamed completions and then reads for ``--measure-s``. Printed for each number of routers (0: one process that also
keeps the instances): CPU time of all processes of API and routing for each token, memory for each stream, and the time
from an instance's emission to the client's reading.
"""

import argparse
import asyncio
import contextlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec
import numpy as np
import psutil
import uvloop
from rich.console import Console
from rich.table import Table

from disagg.base.config import InstanceGroup, InstanceSettings, ModelSettings, Placement, RouterSettings, ServeSettings
from disagg.base.ids import RequestId, owner_of
from disagg.base.message_fields import PROTOCOL_VERSION
from disagg.base.messages import (
    Abort,
    Generate,
    InstanceFacts,
    InstanceLoad,
    LoadReport,
    Ready,
    SequenceOutput,
    StageStamps,
    StepOutput,
    Stop,
)
from disagg.base.parent import end_with_parent
from disagg.base.request import GenerationRequest, Role
from disagg.base.router_messages import JoinRouter, LeaveRouter
from disagg.base.sampling import FinishReason
from disagg.base.step_limits import StepLimits
from disagg.bench.compare.server_process import terminable
from disagg.cli.serve_output import make_display
from disagg.engine.control import ControlChannel
from disagg.models.locate import locate_model
from disagg.models.tokenizer import load_tokenizer
from disagg.serve.launch.api_parts import open_api
from disagg.serve.launch.deployment import Deployment, FrontSettings
from disagg.serve.launch.descriptors import raise_descriptor_limit
from disagg.serve.launch.listening import listen
from disagg.serve.launch.server import LiveServer
from disagg.serve.launch.supervisor import SupervisedServer

LETTERS: Final = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""A lane's token is one of these: its place tells when in the interval the lane emits."""
COLUMNS: Final = (
    *("routers", "tokens", "CPU per token", "instances", "memory per stream", "P50", "P99", "max", "lost", "clients"),
)
SETTLE_S: Final = 3.0
"""What a server that is ready still starts: processes that prepare requests."""
END_S: Final = 120.0
REPORT_S: Final = 0.5
DEADLINE_S: Final = 300.0


@dataclass
class Options:
    """What is measured, and for how long."""

    streams: int
    instances: int
    batch: int
    interval_s: float
    measure_s: float
    max_tokens: int


# An instance without a model ----------------------------------------------------------------------------------------


@dataclass
class Lane:
    """Sequences that are decoded together."""

    token: int
    due_s: float
    sequences: dict[RequestId, tuple[GenerationRequest, int]] = field(default_factory=dict)


class PacedInstance:
    """Emits tokens at a set rate."""

    def __init__(self, settings: InstanceSettings, options: Options) -> None:
        tokenizer = load_tokenizer(locate_model(settings.model.model, settings.model.model_code))
        self._options = options
        num_lanes = min(len(LETTERS), max(1, math.ceil(options.streams / options.instances / options.batch)) + 1)
        started_s = math.ceil(time.monotonic() / options.interval_s) * options.interval_s
        self._lanes = [
            Lane(tokenizer.encode(letter, False)[0], started_s + options.interval_s * place / len(LETTERS))
            for place, letter in enumerate(LETTERS)
        ][:: max(1, len(LETTERS) // num_lanes)]
        self._channel = ControlChannel(settings.control_endpoint, settings.instance, settings.control_key)
        self._instance = settings.instance
        facts = InstanceFacts(
            pid=psutil.Process().pid,
            device="cpu",
            kernel_backend="none",
            num_blocks=1 << 20,
            block_size=64,
            max_model_len=options.max_tokens + 64,
            vocab_size=1 << 17,
            weight_bytes=0,
            kv_bytes=1 << 30,
            load_s=0.0,
            pool=b"",
            limits=StepLimits(max_batch_size=options.streams),
        )
        self._ready = Ready(
            version=PROTOCOL_VERSION,
            instance=settings.instance,
            incarnation=str(facts.pid),
            role=settings.role,
            facts=facts,
        )

    def run(self) -> None:
        """Serve until told to stop."""
        self._channel.send(self._ready)
        report_s = 0.0
        while True:
            now = time.monotonic()
            if now >= report_s:
                self._report()
                report_s = now + REPORT_S
            lane = min(self._lanes, key=lambda one: one.due_s)
            for message in self._channel.receive(max(0.0, min(report_s, lane.due_s) - now)):
                match message:
                    case Generate(request=request):
                        emptiest = min(self._lanes, key=lambda one: len(one.sequences))
                        emptiest.sequences[request.request_id] = (request, 0)
                    case Abort(request_id=request_id):
                        self._drop({request_id})
                    case JoinRouter(router=router, endpoint=endpoint):
                        self._channel.join(router, endpoint)
                        self._channel.send_to(router, self._ready)
                    case LeaveRouter(router=router):
                        self._channel.leave(router)
                        gone = {name for one in self._lanes for name in one.sequences if owner_of(name) == router}
                        self._drop(gone)
                    case Stop():
                        return
            if time.monotonic() >= lane.due_s:
                self._emit(lane)

    def _report(self) -> None:
        load = InstanceLoad(num_running=sum(len(lane.sequences) for lane in self._lanes))
        self._channel.send(LoadReport(instance=self._instance, incarnation=self._ready.incarnation, load=load))

    def _drop(self, names: set[RequestId]) -> None:
        for lane in self._lanes:
            for name in names & lane.sequences.keys():
                del lane.sequences[name]

    def _emit(self, lane: Lane) -> None:
        now = time.monotonic()
        lane.due_s += self._options.interval_s
        outputs = []
        for name, (request, num_before) in list(lane.sequences.items()):
            is_last = num_before + 1 == request.sampling.max_tokens
            stamps = None if num_before else StageStamps(received_s=now, scheduled_s=now, first_step_done_s=now)
            outputs.append(
                SequenceOutput(
                    request_id=name,
                    epoch=request.epoch,
                    token_ids=(lane.token,),
                    finish_reason=FinishReason.LENGTH if is_last else None,
                    stamps=stamps,
                )
            )
            lane.sequences[name] = (request, num_before + 1)
            if is_last:
                del lane.sequences[name]
        if outputs:
            self._channel.send(StepOutput(outputs=tuple(outputs)))


# The server ---------------------------------------------------------------------------------------------------------


def serve(num_routers: int, options: Options, arguments: Sequence[str]) -> None:
    """Run a server over such instances until a signal ends it, or the process that measures is gone."""
    end_with_parent(os.getppid())
    raise_descriptor_limit()
    deployment = Deployment(
        placement=Placement(groups=(InstanceGroup(role=Role.COLOCATED, count=options.instances, num_threads=1),)),
        model=ModelSettings(),
        serve=ServeSettings(port=0, drain_s=0.0, header_timeout_s=DEADLINE_S),
        router=RouterSettings(max_queued_requests=2 * options.streams, request_timeout_s=7200.0),
        front=FrontSettings(routers=num_routers or None),
    )
    engine = (sys.executable, __file__, "instance", *arguments)
    with (
        make_display(True, 40) as display,
        listen(deployment.serve) as bound,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        contextlib.ExitStack() as resources,
    ):
        if num_routers:
            model = open_api(deployment, contextlib.ExitStack()).model
            runner.run(SupervisedServer(deployment, bound, display, model_name=model.name, engine_command=engine).run())
            return
        parts = open_api(deployment, resources)
        server = LiveServer(
            deployment,
            bound,
            parts.make_app,
            display,
            model_name=parts.model.name,
            sink=parts.metrics,
            engine_command=engine,
        )
        runner.run(server.run())


# The client ---------------------------------------------------------------------------------------------------------


class StreamReader(asyncio.Protocol):
    """One streamed completion: notes when each token came, beside when its lane emitted it."""

    def __init__(self, request: bytes, interval_s: float, client: "Client") -> None:
        self._request = request
        self._interval_s = interval_s
        self._client = client
        self._has_begun = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        place = data.find(b'"text":"')
        while place >= 0:
            letter = data[place + 8 : place + 9].decode()
            if letter in LETTERS:
                phase_s = self._interval_s * LETTERS.index(letter) / len(LETTERS)
                self._client.note((now - phase_s) % self._interval_s, is_first=not self._has_begun)
                self._has_begun = True
            place = data.find(b'"text":"', place + 9)

    def connection_lost(self, exc: Exception | None) -> None:
        self._client.num_lost += 1


class Client:
    """All streams of a run."""

    def __init__(self) -> None:
        self.delays: list[float] = []
        self.num_begun = 0
        self.num_lost = 0
        self.is_measuring = False

    def note(self, delay_s: float, *, is_first: bool) -> None:
        """Take account of a token."""
        self.num_begun += is_first
        if self.is_measuring:
            self.delays.append(delay_s)


@dataclass(frozen=True)
class Figures:
    """What one run showed."""

    router_s: float
    """CPU seconds of API and routing for each token; of the instances; of the client."""
    instance_s: float
    num_tokens: int
    stream_bytes: float
    delays: Sequence[float]
    num_lost: int
    clients: str
    """How many connections each process has."""


async def measure(url: str, server: psutil.Process, options: Options) -> Figures:
    """Open all streams, wait until each has a token, then read."""
    await asyncio.sleep(SETTLE_S)
    host, port = url.removeprefix("http://").split(":")
    running = [one for one in server.children(recursive=True) if one.status() != psutil.STATUS_ZOMBIE]
    front = [server, *(one for one in running if not is_instance(one))]
    engines = [one for one in running if is_instance(one)]
    before = sum(one.memory_info().rss for one in front)
    client, loop = Client(), asyncio.get_running_loop()
    body = json.dumps(
        {"model": "smollm2-135m-instruct", "prompt": [1, 2, 3], "max_tokens": options.max_tokens, "stream": True}
    ).encode()
    request = (
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    )
    request = request % len(body) + body
    for number in range(options.streams):
        await loop.create_connection(lambda: StreamReader(request, options.interval_s, client), host, int(port))
        if number % 100 == 99:
            await asyncio.sleep(0.1)
    async with asyncio.timeout(DEADLINE_S):
        while client.num_begun + client.num_lost < options.streams:
            await asyncio.sleep(0.2)
    num_lost = client.num_lost
    cpu_before = cpu_s(front), cpu_s(engines)
    client.is_measuring = True
    await asyncio.sleep(options.measure_s)
    client.is_measuring = False
    used = cpu_s(front) - cpu_before[0], cpu_s(engines) - cpu_before[1]
    memory = sum(one.memory_info().rss for one in front) - before
    num_tokens = len(client.delays)
    shares = [sum(one.laddr.port == int(port) for one in process.net_connections("tcp")) for process in front]
    return Figures(
        used[0] / num_tokens,
        used[1] / num_tokens,
        num_tokens,
        memory / options.streams,
        client.delays,
        client.num_lost if client.num_lost > num_lost else num_lost,
        "/".join(str(share - 1) for share in shares if share > 1),
    )


def is_instance(process: psutil.Process) -> bool:
    return "instance" in process.cmdline()[2:3]


def cpu_s(processes: Sequence[psutil.Process]) -> float:
    return sum(sum(one.cpu_times()[:2]) for one in processes)


def run_once(num_routers: int, options: Options, arguments: Sequence[str]) -> Figures:
    """Start a server and measure it."""
    command = [sys.executable, __file__, "serve", *arguments, "--routers", str(num_routers)]
    with terminable(), subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = next((said["url"] for said in map(json.loads, process.stdout) if "url" in said), None)
            if url is None:
                raise SystemExit("the server did not start; what it says is above")
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                return runner.run(measure(url, psutil.Process(process.pid), options))
        finally:
            for number in (signal.SIGTERM, signal.SIGTERM):  # the second one ends it at once
                process.send_signal(number)
                time.sleep(0.5)
            process.wait(END_S)


def check_descriptors(num_streams: int) -> None:
    """Raise SystemExit, with the remedy, where too few files can be open."""
    raise_descriptor_limit()
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = num_streams + 4096
    if limit < needed:
        raise SystemExit(f"{num_streams} streams need {needed} open files, {limit} are allowed: raise it (ulimit -n)")


def report(found: dict[int, Figures], options: Options) -> None:
    """Print one row for each number of routers."""
    rate = options.streams / options.interval_s
    table = Table(title=f"{options.streams} streams, {rate:.0f} tokens/s offered")
    for column in (
        "routers",
        "tokens",
        "CPU per token",
        "instances",
        "memory per stream",
        "P50",
        "P99",
        "max",
        "lost",
        "clients",
    ):
        table.add_column(column, justify="right")
    for num_routers, figures in found.items():
        median, high, worst = np.percentile(figures.delays, (50, 99, 100)) * 1e3
        table.add_row(
            str(num_routers or "0 (one process)"),
            str(figures.num_tokens),
            f"{figures.router_s * 1e6:.0f} us",
            f"{figures.instance_s * 1e6:.0f} us",
            f"{figures.stream_bytes / 1024:.1f} KiB",
            f"{median:.1f} ms",
            f"{high:.1f} ms",
            f"{worst:.1f} ms",
            str(figures.num_lost),
            figures.clients,
        )
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", nargs="?", choices=("serve", "instance"), help=argparse.SUPPRESS)
    parser.add_argument("--streams", type=int, default=10_000)
    parser.add_argument("--instances", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64, help="sequences of one step")
    parser.add_argument("--interval-s", type=float, default=2.0, help="between two tokens of a stream")
    parser.add_argument("--measure-s", type=float, default=20.0)
    parser.add_argument("--max-tokens", type=int, default=400)
    parser.add_argument("--routers", default="0,1,2")
    arguments = parser.parse_args()
    options = Options(**{name: getattr(arguments, name) for name in Options.__dataclass_fields__})
    passed = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in Options.__dataclass_fields__]
    if arguments.command == "instance":
        settings = msgspec.json.decode(sys.stdin.buffer.read(), type=InstanceSettings)
        if end_with_parent(settings.parent_pid):
            PacedInstance(settings, options).run()
    elif arguments.command == "serve":
        serve(int(arguments.routers), options, passed)
    else:
        check_descriptors(options.streams)
        numbers = [int(number) for number in arguments.routers.split(",")]
        report({number: run_once(number, options, passed) for number in numbers}, options)


if __name__ == "__main__":
    main()
