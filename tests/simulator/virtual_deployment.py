"""A live deployment in virtual time: the real router's shell and the real engine loops, with everything that takes time
(clock, sockets, model, copying threads, processes) replaced by what knows the time."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from msgspec import structs
from virtual_tiers import VirtualTiers

from disagg.base.errors import ConfigurationError
from disagg.base.event_log import EventLog
from disagg.base.ids import BlockId, Epoch, InstanceId, RequestId
from disagg.base.message_fields import Message
from disagg.base.messages import (
    KvOffer,
    LoadReport,
    MeasureLink,
    StepOutput,
    Stop,
    ToEngine,
    decode_for_engine,
    decode_for_router,
    encode,
)
from disagg.base.request import GenerationRequest
from disagg.base.sampling import SamplingParams
from disagg.costs.latency import StepShape
from disagg.costs.links import SerialLinks
from disagg.engine.executor import ChunkResult
from disagg.engine.loop import Accessories, EngineLoop
from disagg.engine.pulls import EndedPull
from disagg.engine.sequences import Work
from disagg.engine.steps import CompletedStep, run_step
from disagg.scheduling.dispatch.events import Join, ProcessStarting
from disagg.scheduling.instance.core import InstanceCore
from disagg.scheduling.instance.inputs import CopyEnded
from disagg.scheduling.instance.outputs import StartCopy
from disagg.scheduling.router.core import RouterCore
from disagg.scheduling.router.header import RouterHeader
from disagg.scheduling.router.inputs import InstanceSaid, ProcessExited
from disagg.serve.router.record import LiveStream
from disagg.serve.router.shell import RouterShell
from disagg.serve.router.sink import NullSink
from disagg.serve.router.watcher import NullWatcher
from disagg.simulator.borrowing_step import BorrowingStep
from disagg.simulator.cluster import ClusterSpec
from disagg.simulator.copies import FAILED_PULL, LOST_PEER
from disagg.simulator.event_queue import EventQueue
from disagg.simulator.faults import InstanceDeath, TimedCommand
from disagg.simulator.host import SimulatedHost
from disagg.simulator.instance_spec import InstanceSpec
from disagg.simulator.link_figure import link_measured
from disagg.simulator.request import FIRST_EPOCH, SimulatedRequest

TOKEN = 1


class OneTokenModel:
    """Samples the same token for every sequence."""

    def run(self, step: Sequence[Work]) -> list[ChunkResult]:
        return [ChunkResult(token_id=TOKEN if work.chunk.samples else None) for work in step]

    def publish_blocks(self, blocks: Sequence[BlockId]) -> None:
        """There are none."""

    def receive_blocks(self, blocks: Sequence[BlockId]) -> None:
        """There are none."""


class VirtualEngine:
    """One life of an engine: its loop is turned when its thread would wake up. Also its channel, steps and pulls."""

    def __init__(self, deployment: "VirtualDeployment", spec: InstanceSpec, life: int, log_path: Path) -> None:
        self._deployment = deployment
        self._queue = deployment.queue
        self._spec = spec
        self._model = OneTokenModel()
        self._inbox: list[ToEngine] = []
        self._launched: list[tuple[float, float, int, Sequence[Work]]] = []
        self._pace: BorrowingStep | None = None
        if spec.cores is not None:
            deployment.host.join(spec.name, lambda: None)
            deployment.host.lend_among(spec.name, spec.cores, self._change_pace)
        self._free_at_s = 0.0
        self._borrowed_s = 0.0
        self._copies: list[tuple[StartCopy, EndedPull]] = []
        self._lost_peers: set[str] = set()
        self._is_turn_due = False
        self.is_alive = True
        ready = spec.ready(f"{spec.name}.{life}")
        self.ready = structs.replace(ready, facts=structs.replace(ready.facts, vocab_size=TOKEN + 1))
        header = spec.header(self.ready.incarnation)
        self._log = EventLog(log_path, header)
        tiers = VirtualTiers(spec, deployment.queue, self.wake_thread) if header.tiers() else None
        self._loop = EngineLoop(
            self.ready,
            InstanceCore(header),
            self,
            self._model,
            self,  # type: ignore[arg-type]
            self,  # type: ignore[arg-type]
            deployment.queue,
            Accessories(self._log, tiers),
        )

    def kill(self) -> None:
        self.is_alive = False
        if self._spec.cores is not None:
            self._pace = None
            self._deployment.host.end_step(self._spec.name)
            self._deployment.host.lend(self._spec.name)
        self._log.close()

    def wake_thread(self) -> None:
        """Something came: the thread turns, unless it computes a step."""
        if self.is_alive and not self._launched and not self._is_turn_due:
            self._plan_turn()

    def _plan_turn(self) -> None:
        self._is_turn_due = True
        self._queue.push_turn(self._turn)

    def _turn(self) -> None:
        if not self.is_alive:
            return
        self._is_turn_due = False
        self._loop._turn()
        if self._spec.cores is not None and not self._launched:
            self._deployment.host.lend(self._spec.name)  # as the next look for a step does
        if self._loop._wake_s < float("inf"):
            self._queue.push(max(self._loop._wake_s, self._queue.now()), self.wake_thread)

    # The control channel

    routers = ()

    def send(self, message: Message) -> None:
        if not isinstance(message, LoadReport):  # simulated instances send none
            self._deployment.to_router(self._spec.name, encode(message))

    def receive(self, timeout_s: float) -> list[ToEngine]:
        messages, self._inbox = self._inbox, []
        return messages

    def deliver(self, data: bytes) -> None:
        if not self.is_alive:
            return
        message = decode_for_engine(data)
        if isinstance(message, MeasureLink):
            self._measure(message)
            return
        self._inbox.append(message)
        self.wake_thread()

    def _measure(self, asked: MeasureLink) -> None:
        own = self._spec.name, self.ready.incarnation
        self.send(link_measured(self._deployment.links, (asked.source, asked.incarnation), own))

    # Steps

    def launch(self, step_id: int, step: Sequence[Work], num_borrowed: int) -> None:
        if self._spec.cores is not None:
            self._launch_paced(step_id, step, num_borrowed)
            return
        start_s = max(self._queue.now(), self._free_at_s)
        stage_times_s = self._spec.latency.stage_times_s(StepShape.of(work.chunk for work in step))
        for duration_s in stage_times_s:
            start_s += duration_s
        self._free_at_s = start_s
        self._launched.append((start_s, sum(stage_times_s), step_id, step))
        self._queue.push(start_s, self._end_step)

    def _launch_paced(self, step_id: int, step: Sequence[Work], num_borrowed: int) -> None:
        host, name = self._deployment.host, self._spec.name
        shape = StepShape.of(work.chunk for work in step)
        paces = host.begin_step(name, num_borrowed, self._spec.paces)
        times_s = {number: latency.stage_times_s(shape)[0] for number, latency in paces.items()}
        self._pace = BorrowingStep(times_s, self._queue.now(), host.num_borrowed(name))
        self._launched.append((math.inf, 0.0, step_id, step))
        self._queue.push(self._pace.end_s, partial(self._end_paced, self._pace, self._pace.end_s))

    def _change_pace(self) -> None:
        if self._pace is not None:
            self._pace.change(self._queue.now(), self._deployment.host.num_borrowed(self._spec.name))
            self._queue.push(self._pace.end_s, partial(self._end_paced, self._pace, self._pace.end_s))

    def _end_paced(self, pace: BorrowingStep, due_s: float) -> None:
        if pace is self._pace and due_s == pace.end_s:
            self._pace = None
            pace.finish()
            self._borrowed_s = pace.borrowed_s
            _, _, step_id, step = self._launched.pop()
            self._launched.append((due_s, due_s - pace.started_s, step_id, step))
            self._deployment.host.end_step(self._spec.name)
            self._end_step()

    def _end_step(self) -> None:
        if self.is_alive and not self._is_turn_due:
            self._plan_turn()

    def poll(self) -> CompletedStep | None:
        if not self._launched or self._launched[0][0] > self._queue.now():
            return None
        _, duration_s, step_id, step = self._launched.pop(0)
        completed = run_step(self._model, self._queue, step_id, step)
        done = structs.replace(completed.done, duration_s=duration_s, borrowed_s=self._borrowed_s)
        return replace(completed, done=done)

    # Pulls

    def start(self, copy: StartCopy, now: float) -> None:
        num_bytes = self._spec.copied_bytes(copy)
        end_s = self._deployment.links.start(copy.source, self._spec.name, num_bytes, now)
        failing_pulls = self._deployment.failing_pulls[self._spec.name]
        failure = FAILED_PULL if copy.request_id in failing_pulls else ""
        failing_pulls.discard(copy.request_id)
        result = CopyEnded(
            request_id=copy.request_id,
            epoch=copy.epoch,
            num_bytes=0 if failure else num_bytes,
            started_s=now,
            ended_s=end_s,
            failure=failure,
        )
        self._copies.append((copy, EndedPull(result, tuple(one.target for one in copy.copies))))
        self._queue.push(end_s, self.wake_thread)

    def take_ended(self) -> list[EndedPull]:
        ended = [one for one in self._copies if one[1].result.ended_s <= self._queue.now()]
        self._copies = [one for one in self._copies if one not in ended]
        return [self._outcome(copy, pull) for copy, pull in ended]

    def _outcome(self, copy: StartCopy, pull: EndedPull) -> EndedPull:
        if copy.offer.incarnation not in self._lost_peers:
            return pull
        result = pull.result
        lost = CopyEnded(
            request_id=result.request_id,
            epoch=result.epoch,
            num_bytes=0,
            started_s=result.started_s,
            ended_s=result.ended_s,
            failure=result.failure or LOST_PEER,
        )
        return EndedPull(lost, pull.targets)

    def seal(self, offer: KvOffer, *, is_part: bool = False) -> KvOffer:
        return offer

    def forget(self, request_id: RequestId, epoch: Epoch) -> None:
        """Offers have no digests."""

    def cancel(self, request_id: RequestId, epoch: Epoch) -> None:
        """A copy under way takes its time all the same."""

    def close_peer(self, incarnation: str) -> None:
        self._lost_peers.add(incarnation)


class _Timer:
    def __init__(self) -> None:
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


class VirtualLoop:
    """What the router's shell asks of asyncio."""

    def __init__(self, queue: EventQueue) -> None:
        self._queue = queue

    def call_later(self, delay_s: float, call: Callable[[], None]) -> _Timer:
        timer = _Timer()
        # Never early for want of the last bit of a difference.
        self._queue.push(self._queue.now() + delay_s + 1e-9, lambda: None if timer.is_cancelled else call())
        return timer


class VirtualDeployment(NullWatcher):
    """The router's shell, its socket, and the launcher."""

    def __init__(self, spec: ClusterSpec, folder: Path) -> None:
        self.queue = EventQueue()
        self.host = SimulatedHost(self.queue)
        """What lends cores to whom; nothing else of it is used."""
        places = spec.places()
        self.links = SerialLinks(lambda source, target: spec.topology.route(places[source], places[target]))
        everybody = (*spec.instances, *spec.spares)
        self.failing_pulls = {instance.name: set(spec.faults.failing_pulls) for instance in everybody}
        self.streams: dict[RequestId, LiveStream] = {}
        self.token_times: dict[RequestId, list[float]] = {}
        self._spec = spec
        self._folder = folder
        self._lives = {instance.name: 0 for instance in everybody}
        self._start_s: dict[InstanceId, float] = {}
        self._by_name = {instance.name: instance for instance in everybody}
        header = RouterHeader(
            instances={instance.name: instance.role for instance in spec.instances},
            settings=spec.router,
            scheduler=spec.instances[0].scheduler,
            watches_silence=False,
            measures_links=True,
        )
        self.core = RouterCore(header)
        self.shell = RouterShell(
            self.core,
            self,
            clock=self.queue,
            sink=NullSink(),
            event_log=EventLog(folder / "router.jsonl", header),
        )
        self.shell.watcher = self
        self.engines = {name: self._new_engine(name) for name in self._by_name}
        for death in spec.faults.deaths:
            self.queue.push(death.time_s, partial(self._kill, death))
        for timed in spec.faults.commands:
            self.queue.push(timed.time_s, partial(self._command, timed))

    def run(self, requests: Sequence[SimulatedRequest]) -> None:
        for instance in self._spec.instances:
            ready = self.engines[instance.name].ready
            self.shell.feed(InstanceSaid(instance=instance.name, message=ready))
        for request in requests:
            self.queue.push(request.arrival_s, partial(self._submit, request))
            if request.cancel_s < float("inf"):
                self.queue.push(request.cancel_s, partial(self.shell.cancel, request.request_id))
        self.queue.run()
        for engine in self.engines.values():
            engine.kill()
        self.shell.close()

    def _submit(self, request: SimulatedRequest) -> None:
        generation = GenerationRequest(
            request_id=request.request_id,
            epoch=FIRST_EPOCH,
            prompt_token_ids=(0,) * request.prompt_len,
            block_hashes=request.prompt_names,
            hash_block_size=request.hash_block_size,
            sampling=SamplingParams(max_tokens=request.output_len, seed=0),
            arrival_s=request.arrival_s,
        )
        self.streams[request.request_id] = self.shell.submit(generation)

    # Processes

    def _new_engine(self, name: InstanceId) -> VirtualEngine:
        life = self._lives[name]
        number = f".{life}" if life else ""
        return VirtualEngine(self, self._by_name[name], life, self._folder / f"{name}{number}.jsonl")

    def _command(self, timed: TimedCommand) -> None:
        command = timed.command
        try:
            self.shell.feed(command)
        except ConfigurationError:
            return
        if isinstance(command, Join):
            self._start_s[command.instance] = timed.start_s
            self.queue.push(self.queue.now() + timed.start_s, partial(self._join, command.instance))

    def _join(self, instance: InstanceId) -> None:
        if self.engines[instance].is_alive:
            self.to_router(instance, encode(self.engines[instance].ready))
        else:
            self._come_up(instance)

    def instance_leaving(self, instance: InstanceId) -> None:
        self.queue.push(self.queue.now(), partial(self._stop, instance))

    def _stop(self, instance: InstanceId) -> None:
        self.engines[instance].kill()
        if self.core.members.get(instance) is not None:
            self.shell.feed(ProcessExited(instance=instance, detail="it was removed"))

    def _kill(self, death: InstanceDeath) -> None:
        if not self.engines[death.instance].is_alive or self.core.members.get(death.instance) is None:
            return
        self._start_s[death.instance] = death.start_s
        self.engines[death.instance].kill()
        self.shell.feed(ProcessExited(instance=death.instance, detail="killed by the simulation"))

    def restart_instance(self, instance: InstanceId, delay_s: float) -> None:
        self.queue.push(self.queue.now() + delay_s, partial(self._start, instance))

    def _start(self, instance: InstanceId) -> None:
        if self.core.members.get(instance) is not None:
            self.shell.feed(ProcessStarting(instance=instance))
            self.queue.push(self.queue.now() + self._start_s[instance], partial(self._come_up, instance))

    def _come_up(self, instance: InstanceId) -> None:
        if self.core.members.get(instance) is None:
            return
        self._lives[instance] += 1
        self.engines[instance] = engine = self._new_engine(instance)
        self.to_router(instance, encode(engine.ready))

    # The control socket

    def open(self, receive: object) -> None:
        """It is open."""

    def close(self) -> None:
        """Nothing is held."""

    def send(self, instance: InstanceId, data: bytes) -> None:
        if isinstance(decode_for_engine(data), Stop):
            return  # ``instance_leaving`` ends it
        self._later(lambda: self.engines[instance].deliver(data))

    def to_router(self, instance: InstanceId, data: bytes) -> None:
        self._later(partial(self._hear, instance, data))

    def _hear(self, instance: InstanceId, data: bytes) -> None:
        message = decode_for_router(data)
        if isinstance(message, StepOutput):
            for output in message.outputs:
                self.token_times.setdefault(output.request_id, []).append(self.queue.now())
            self.shell.emit(instance, message.outputs)
        else:
            self.shell.feed(InstanceSaid(instance=instance, message=message))

    def _later(self, call: Callable[[], None]) -> None:
        if self._spec.message_s:
            self.queue.push(self.queue.now() + self._spec.message_s, call)
        else:
            call()
