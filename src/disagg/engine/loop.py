"""The live shell of an instance's core: real messages, a real executor and real pulls, in one thread.

Every turn takes what has arrived, lets the core decide once, and carries out what it says, in order. Nothing is decided
here but what needs token values: whether a sequence ends with the token just sampled.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

from msgspec import structs

from disagg.base.clock import Clock
from disagg.base.event_log import EventLog
from disagg.base.messages import (
    Adopt,
    Audited,
    CostsLearned,
    Failed,
    Generate,
    MeasureLink,
    NotHeld,
    Offered,
    PartOffered,
    Pulled,
    Ready,
    ReportBlocks,
    Reserve,
    StepOutput,
    Stop,
    ToEngine,
)
from disagg.base.router_messages import JoinRouter, LeaveRouter
from disagg.engine.control import ControlChannel
from disagg.engine.executor import BlockMover
from disagg.engine.grammar import Grammars
from disagg.engine.kv_tiers import KvTiers
from disagg.engine.link_measuring import LinkMeasuring
from disagg.engine.load_reporter import LoadReporter
from disagg.engine.pulls import Pulls
from disagg.engine.sequences import SequenceTable
from disagg.engine.steps import CompletedStep, Steps
from disagg.scheduling.event_log import InstanceRecord
from disagg.scheduling.instance.core import InstanceCore
from disagg.scheduling.instance.inputs import AnyInstanceInput, Continue, Expect, LoadEnded, Start
from disagg.scheduling.instance.outputs import (
    AnyInstanceOutput,
    CacheChanged,
    CancelCopy,
    Emitted,
    ForgetPeer,
    StartCopy,
)
from disagg.scheduling.step.actions import DropSaved, Forget, LoadBlocks, RunStep, SaveBlock, WakeAt
from disagg.scheduling.step.events import Tick


@dataclass(frozen=True, slots=True)
class Accessories:
    """What an instance may have besides: a log of its decisions, tiers for KV blocks, a compiler of grammars, links
    to measure.
    """

    log: EventLog | None = None
    tiers: KvTiers | None = None
    grammars: Grammars | None = None
    links: LinkMeasuring | None = None


class EngineLoop:
    """Drives one core until it is told to stop."""

    def __init__(
        self,
        ready: Ready,
        core: InstanceCore,
        steps: Steps,
        blocks: BlockMover,
        pulls: Pulls,
        channel: ControlChannel,
        clock: Clock,
        accessories: Accessories,
    ) -> None:
        self._ready = ready
        self._core = core
        self._steps = steps
        self._blocks = blocks
        self._pulls = pulls
        self._channel = channel
        self._clock = clock
        self._log = accessories.log
        self._tiers = accessories.tiers
        self._links = accessories.links
        self._sequences = SequenceTable(ready.facts.vocab_size, core.named_block_size, accessories.grammars)
        self._reporter = LoadReporter(ready.instance, ready.incarnation, channel)
        self._lesson: CostsLearned | None = None
        self._completed: CompletedStep | None = None
        self._wake_s = math.inf
        self._is_stopping = False

    def run(self) -> None:
        """Say Ready, then serve until a Stop message or ``stop``."""
        self._channel.send(self._ready)
        while not self._is_stopping:
            self._turn()

    def stop(self) -> None:
        """End ``run`` after the step that is running. Safe from any thread and from a signal handler."""
        self._is_stopping = True
        self._channel.wake()

    def _turn(self) -> None:
        inputs = self._collect()
        if self._is_stopping:
            return
        if inputs:
            self._advance(inputs)
        self._reporter.update(self._core, self._clock.now())

    # In -----------------------------------------------------------------------------------------------------

    def _collect(self) -> list[AnyInstanceInput]:
        """Return everything that happened; wait for it when no step has ended."""
        inputs: list[AnyInstanceInput] = []
        self._completed = self._steps.poll()
        if self._completed is not None:
            inputs.append(self._completed.done)
        idle_s = min(self._wake_s, self._reporter.due_s) - self._clock.now()
        for message in self._channel.receive(0.0 if inputs else idle_s):
            if isinstance(message, Stop):
                self._is_stopping = True
            elif isinstance(message, MeasureLink):
                if self._links is not None:
                    self._links.start(message)
            elif isinstance(message, JoinRouter):
                inputs.append(self._join(message))
            else:
                inputs.append(self._input(message))
        for ended in self._pulls.take_ended():
            if ended.received:
                self._blocks.receive_blocks(ended.received)
            inputs.append(ended.result)
        if self._tiers is not None:
            inputs += self._collect_from(self._tiers)
        for measured in () if self._links is None else self._links.take_ended():
            self._channel.send(measured)
        if self._clock.now() >= self._wake_s:
            inputs.append(Tick())
        return inputs

    def _collect_from(self, tiers: KvTiers) -> list[AnyInstanceInput]:
        inputs: list[AnyInstanceInput] = []
        for ended in tiers.take_ended():
            if isinstance(ended.result, LoadEnded) and ended.result.is_whole:
                self._blocks.receive_blocks(ended.targets)
            inputs.append(ended.result)
        return inputs

    def _input(self, message: ToEngine) -> AnyInstanceInput:
        match message:
            case Generate(request=request, hand_over=hand_over, prefix=prefix):
                return Start(sequence=self._sequences.add(request), hand_over=hand_over, prefix=prefix)
            case Adopt(request=request, offer=offer):
                return Continue(sequence=self._sequences.add(request), offer=offer)
            case Reserve(request=request, offer=offer):
                return Expect(sequence=self._sequences.facts_of(request), offer=offer)
            case Stop() | MeasureLink() | JoinRouter():
                raise AssertionError("these are not for the core")
            case LeaveRouter(router=router):
                self._channel.leave(router)
                return message
            case _:
                return message

    def _join(self, message: JoinRouter) -> ReportBlocks:
        """Tell one more router what the others know, and let the core say which blocks are cached."""
        self._channel.join(message.router, message.endpoint)
        self._channel.send_to(message.router, self._ready)
        for known in (self._lesson, *(() if self._links is None else self._links.known)):
            if known is not None:
                self._channel.send_to(message.router, known)
        self._reporter.report_soon()
        return ReportBlocks()

    # Out ----------------------------------------------------------------------------------------------------

    def _advance(self, inputs: Sequence[AnyInstanceInput]) -> None:
        """Let the core decide once and do what it says."""
        now = self._clock.now()
        if now >= self._wake_s:
            self._wake_s = math.inf
        outputs = self._core.handle(inputs, now)
        if self._log is not None:
            self._log.record(InstanceRecord(now, tuple(inputs), tuple(outputs)))
        for output in outputs:
            self._carry_out(output, now)

    def _carry_out(self, output: AnyInstanceOutput, now: float) -> None:
        match output:
            case Emitted():
                self._emit(output)
            case RunStep(step_id=step_id, chunks=chunks, num_borrowed=num_borrowed):
                self._steps.launch(step_id, self._sequences.works(chunks), num_borrowed)
            case Offered() | PartOffered():
                self._offer(output)
            case NotHeld() | Pulled() | Failed() | CostsLearned() | Audited():
                self._tell(output)
            case CacheChanged(message=message, owners=owners):
                self._channel.send(self._sequences.with_tokens(message, owners) if owners else message)
            case Forget(request_id=request_id, epoch=epoch):
                self._sequences.drop(request_id, epoch)
                self._pulls.forget(request_id, epoch)
            case StartCopy():
                self._pulls.start(output, now)
            case CancelCopy(request_id=request_id, epoch=epoch):
                self._pulls.cancel(request_id, epoch)
            case LoadBlocks() | SaveBlock() | DropSaved():
                self._use_tiers(output)
            case ForgetPeer(incarnation=incarnation):
                self._pulls.close_peer(incarnation)
            case WakeAt(time_s=time_s):
                self._wake_s = time_s
            case _:
                assert_never(output)

    def _offer(self, message: Offered | PartOffered) -> None:
        offer = message.offer
        if not offer.behind_step:  # else it is computed where it is read
            self._blocks.publish_blocks(offer.block_ids)
        sealed = self._pulls.seal(offer, is_part=isinstance(message, PartOffered))
        self._channel.send(structs.replace(message, offer=sealed))

    def _tell(self, message: NotHeld | Pulled | Failed | CostsLearned | Audited) -> None:
        if isinstance(message, CostsLearned):
            self._lesson = message
        self._channel.send(message)

    def _use_tiers(self, output: LoadBlocks | SaveBlock | DropSaved) -> None:
        assert self._tiers is not None, "a core without tiers wants nothing from them"
        match output:
            case LoadBlocks():
                self._tiers.load(output)
            case SaveBlock(block=block):
                self._blocks.publish_blocks((block,))
                self._tiers.save(output)
            case DropSaved():
                self._tiers.drop(output)

    def _emit(self, output: Emitted) -> None:
        assert self._completed is not None, "tokens come from the step that was collected in this turn"
        outputs = self._completed.outputs
        if len(output.request_ids) < len(outputs):
            outputs = {request_id: outputs[request_id] for request_id in output.request_ids}
        for first in output.firsts:
            outputs[first.request_id] = structs.replace(
                outputs[first.request_id],
                prompt_logprobs=self._completed.take_prompt_logprobs(first.request_id),
                num_cached_tokens=first.num_cached_tokens,
                stamps=first.stamps,
            )
        self._channel.send(StepOutput(outputs=tuple(outputs.values())))
