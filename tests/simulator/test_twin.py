"""The engine's own loop against the simulator, both in virtual time and with the same cost of a step.

The loop, inbox and scheduler are the live ones; its clock, its socket, its model and its copying threads are replaced
by ones that know the time. Then both must take the same decisions at the same moments: their logs are equal.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from simulated import LinearLatency, cluster_spec, instance, poisson, serve

from disagg.base.config import SchedulingMode
from disagg.base.ids import BlockId
from disagg.base.messages import Adopt, Generate, InstanceFacts, Message, Offered, Ready, StepOutput, Stop, ToEngine
from disagg.base.request import GenerationRequest, Role
from disagg.base.sampling import SamplingParams
from disagg.costs.latency import LatencyModel, StepShape
from disagg.costs.links import LinkModel, Route, SerialLinks
from disagg.engine.event_log import EventLog as EngineLog
from disagg.engine.executor import ChunkResult, Work
from disagg.engine.loop import EngineLoop
from disagg.engine.pulls import PullResult
from disagg.scheduling.step.actions import Pull, RunStep
from disagg.scheduling.step.replay import LogRecord, parse_log
from disagg.scheduling.step.scheduler import StepScheduler
from disagg.simulator.event_log import EventLog
from disagg.simulator.instance import InstanceSpec
from disagg.simulator.request import FIRST_EPOCH, SimulatedRequest
from disagg.transfer.link import TransferState

LINK = LinkModel(bytes_per_s=2e8, latency_s=0.0007)
TOKEN = 1


class VirtualClock:
    def __init__(self) -> None:
        self.time_s = 0.0

    def now(self) -> float:
        return self.time_s


class VirtualPulls:
    """Pulls that end when the link model says so."""

    def __init__(self, clock: VirtualClock, spec: InstanceSpec) -> None:
        self._clock = clock
        self._spec = spec
        self._links = SerialLinks(lambda source, target: Route.over(LINK))
        self.running: list[PullResult] = []

    def start(self, pull: Pull, address: bytes, now: float) -> None:
        num_bytes = len(pull.copies) * self._spec.block_size * self._spec.kv_bytes_per_token
        end_s = self._links.start(pull.source, self._spec.name, num_bytes, now)
        targets = tuple(copy.target for copy in pull.copies)
        self.running.append(
            PullResult(pull.request_id, pull.epoch, targets, TransferState.DONE, "", num_bytes, now, end_s)
        )

    def take_ended(self) -> list[PullResult]:
        ended = [result for result in self.running if result.ended_s <= self._clock.time_s]
        self.running = [result for result in self.running if result not in ended]
        return ended


class VirtualChannel:
    """Messages that come at given times; waiting for one lets the time pass. Ends the loop when all is done."""

    def __init__(self, clock: VirtualClock, pulls: VirtualPulls, messages: Sequence[tuple[float, ToEngine]]) -> None:
        self._clock = clock
        self._pulls = pulls
        self._coming = sorted(messages, key=lambda entry: entry[0])
        self.sent: list[tuple[float, Message]] = []

    def send(self, message: Message) -> None:
        self.sent.append((self._clock.time_s, message))

    def receive(self, timeout_s: float) -> list[ToEngine]:
        if timeout_s > 0:
            due = [time_s for time_s, _ in self._coming[:1]] + [result.ended_s for result in self._pulls.running]
            if not due:
                return [Stop()]
            self._clock.time_s = min([*due, self._clock.time_s + math.ceil(timeout_s * 1e3) / 1e3])
        ready = [message for time_s, message in self._coming if time_s <= self._clock.time_s]
        self._coming = self._coming[len(ready) :]
        return ready


class VirtualExecutor:
    """Takes the time that the latency model says."""

    def __init__(self, clock: VirtualClock, latency: LatencyModel) -> None:
        self._clock = clock
        self._latency = latency

    def run(self, step: Sequence[Work]) -> list[ChunkResult]:
        for duration_s in self._latency.stage_times_s(StepShape.of(work.chunk for work in step)):
            self._clock.time_s += duration_s
        return [ChunkResult(token_id=TOKEN if work.chunk.samples else None) for work in step]

    def publish_blocks(self, blocks: Sequence[BlockId]) -> None:
        pass

    def receive_blocks(self, blocks: Sequence[BlockId]) -> None:
        pass


def run_engine(
    spec: InstanceSpec, messages: Sequence[tuple[float, ToEngine]], log_path: Path
) -> list[tuple[float, Message]]:
    """Run one live loop over these messages; return what it sent, and when."""
    clock = VirtualClock()
    pulls = VirtualPulls(clock, spec)
    channel = VirtualChannel(clock, pulls, messages)
    facts = InstanceFacts(
        pid=1,
        device="cpu",
        kernel_backend="fake",
        num_blocks=spec.num_blocks,
        block_size=spec.block_size,
        max_model_len=spec.capacity,
        vocab_size=10,
        weight_bytes=0,
        kv_bytes=0,
        load_s=0.0,
        pool=b"",
    )
    ready = Ready(version=1, instance=spec.name, incarnation="i", role=spec.role, facts=facts)
    scheduler = StepScheduler(spec.scheduler, spec.num_blocks, spec.block_size, spec.prefix_caching)
    log = EngineLog(str(log_path), spec.log_header())
    loop = EngineLoop(
        ready,
        scheduler,
        VirtualExecutor(clock, spec.latency),
        pulls,  # type: ignore[arg-type]
        channel,  # type: ignore[arg-type]
        clock,
        log,
    )
    loop.run()
    log.close()
    return channel.sent


def generation_request(request: SimulatedRequest, num_output_tokens: int = 0) -> GenerationRequest:
    return GenerationRequest(
        request_id=request.request_id,
        epoch=FIRST_EPOCH,
        prompt_token_ids=(0,) * request.prompt_len,
        sampling=SamplingParams(max_tokens=request.output_len, seed=0),
        output_token_ids=(TOKEN,) * num_output_tokens,
        arrival_s=request.arrival_s,
    )


def records(path: Path) -> tuple[LogRecord, ...]:
    return parse_log(path.read_bytes().splitlines(keepends=True)).records


def decisions(path: Path) -> list[tuple[float, object]]:
    """When each step, pull, emission and end was decided, without block numbers."""
    told: list[tuple[float, object]] = []
    for record in records(path):
        for action in record.actions:
            match action:
                case RunStep(chunks=chunks):
                    told.append((record.now, [(c.request_id, c.start, c.num_tokens, c.samples) for c in chunks]))
                case Pull(request_id=request_id, copies=copies):
                    told.append((record.now, (request_id, len(copies))))
                case _:
                    told.append((record.now, type(action).__name__))
    return told


def token_times(sent: Sequence[tuple[float, Message]], request: SimulatedRequest) -> list[float]:
    return [
        time_s
        for time_s, message in sent
        if isinstance(message, StepOutput)
        for output in message.outputs
        if output.request_id == request.request_id
    ]


@pytest.mark.parametrize("mode", SchedulingMode)
@pytest.mark.parametrize("num_blocks", [512, 40])
def test_a_colocated_engine_and_its_simulation_write_the_same_log(
    mode: SchedulingMode, num_blocks: int, tmp_path: Path
) -> None:
    spec = instance(Role.COLOCATED, num_blocks=num_blocks, scheduling=mode, latency=LinearLatency())
    requests = poisson(rate=40, count=60, seed=4)
    with EventLog(tmp_path) as log:
        serve(cluster_spec(spec), requests, log=log)
    messages = [(request.arrival_s, Generate(request=generation_request(request))) for request in requests]
    sent = run_engine(spec, messages, tmp_path / "engine.jsonl")
    assert records(tmp_path / "engine.jsonl") == records(tmp_path / "colocated-0.jsonl")
    for request in requests:
        times = token_times(sent, request)
        assert len(times) == request.output_len
        assert (times[0], times[-1]) == (request.timeline.first_token_s, request.timeline.last_token_s)


def test_two_engines_with_a_hand_over_and_their_simulation_decide_the_same(tmp_path: Path) -> None:
    """The prefill engine runs to its end before the decode engine starts: it has blocks enough not to wait for it."""
    prefill, decode = instance(Role.PREFILL, num_blocks=4096), instance(Role.DECODE, num_blocks=150)
    requests = poisson(rate=40, count=60, seed=6)
    with EventLog(tmp_path) as log:
        serve(cluster_spec(prefill, decode, link=LINK), requests, log=log)
    arrivals = [(r.arrival_s, Generate(request=generation_request(r), hand_over=True)) for r in requests]
    sent = run_engine(prefill, arrivals, tmp_path / "prefill.jsonl")
    by_id = {request.request_id: request for request in requests}
    adoptions = [
        (time_s, Adopt(request=generation_request(by_id[message.offer.request_id], 1), offer=message.offer))
        for time_s, message in sent
        if isinstance(message, Offered)
    ]
    sent_by_decode = run_engine(decode, adoptions, tmp_path / "decode.jsonl")

    # Leases end only in the simulation, which has a router: prefill's block numbers differ, its decisions do not.
    for name in ("prefill", "decode"):
        assert decisions(tmp_path / f"{name}.jsonl") == decisions(tmp_path / f"{name}-0.jsonl")
    for request in requests:
        times = token_times(sent, request) + token_times(sent_by_decode, request)
        assert len(times) == request.output_len
        assert (times[0], times[-1]) == (request.timeline.first_token_s, request.timeline.last_token_s)
