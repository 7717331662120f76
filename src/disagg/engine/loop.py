"""The live shell of the step scheduler: messages and results in as events, actions carried out, one thread.

Every turn takes what has arrived, lets the scheduler decide once, carries its actions out in order, and runs at most
one step. Nothing is decided here but what needs token values: whether a sequence ends with the token just sampled.
"""

import math
from collections import deque
from collections.abc import Sequence
from typing import assert_never

from disagg.base.clock import Clock
from disagg.base.errors import InternalError
from disagg.base.ids import RequestId
from disagg.base.messages import (
    Failed,
    FailureKind,
    KvOffer,
    Offered,
    Ready,
    SequenceOutput,
    StepOutput,
    Stop,
)
from disagg.base.sampling import FinishReason
from disagg.engine.control import ControlChannel
from disagg.engine.event_log import EventLog
from disagg.engine.executor import Executor, Work
from disagg.engine.inbox import Inbox
from disagg.engine.load_reporter import LoadReporter
from disagg.engine.outbox import accept_results, failed_message, pulled_message
from disagg.engine.pulls import PullResult, Pulls
from disagg.engine.sequences import LiveSequence
from disagg.scheduling.step.actions import (
    AnyAction,
    Emit,
    Finish,
    OfferKv,
    Pull,
    Reject,
    ReleaseLease,
    RunStep,
    WakeAt,
)
from disagg.scheduling.step.events import AnyEvent, StepDone, StepResult, Tick
from disagg.scheduling.step.scheduler import StepScheduler
from disagg.transfer.link import TransferState


class EngineLoop:
    """Drives one scheduler with real messages, a real executor and real pulls until it is told to stop."""

    def __init__(
        self,
        ready: Ready,
        scheduler: StepScheduler,
        executor: Executor,
        pulls: Pulls,
        channel: ControlChannel,
        clock: Clock,
        log: EventLog | None = None,
    ) -> None:
        self._ready = ready
        self._scheduler = scheduler
        self._executor = executor
        self._pulls = pulls
        self._channel = channel
        self._clock = clock
        self._log = log
        self._inbox = Inbox(ready.facts, pulls)
        self._reporter = LoadReporter(ready.instance, ready.incarnation, channel)
        self._steps: deque[tuple[int, tuple[Work, ...]]] = deque()
        self._step_done: StepDone | None = None
        self._outputs: dict[RequestId, SequenceOutput] = {}
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
        events = self._collect()
        if self._is_stopping:
            return
        if events:
            self._advance(events)
        if self._steps:
            self._run_step()
        self._reporter.update(self._scheduler.load, self._clock.now())

    # In -----------------------------------------------------------------------------------------------------

    def _collect(self) -> list[AnyEvent]:
        """Return everything that happened; wait for it when there is nothing to compute."""
        events: list[AnyEvent] = []
        if self._step_done is not None:
            events.append(self._step_done)
            self._step_done = None
        is_busy = bool(events or self._steps)
        idle_s = min(self._wake_s, self._reporter.due_s) - self._clock.now()
        for message in self._channel.receive(0.0 if is_busy else idle_s):
            if isinstance(message, Stop):
                self._is_stopping = True
            else:
                events += self._inbox.events(message, self._clock.now())
        for reply in self._inbox.take_replies():
            self._channel.send(reply)
        for result in self._pulls.take_ended():
            events.append(self._on_pull_ended(result))
        if self._clock.now() >= self._wake_s:
            events.append(Tick())
        return events

    def _on_pull_ended(self, result: PullResult) -> AnyEvent:
        if result.state is TransferState.DONE:
            self._executor.receive_blocks(result.targets)
        return self._inbox.pull_ended(result)

    # Out ----------------------------------------------------------------------------------------------------

    def _advance(self, events: Sequence[AnyEvent]) -> None:
        """Let the scheduler decide once and do what it says."""
        now = self._clock.now()
        if now >= self._wake_s:
            self._wake_s = math.inf
        actions = self._scheduler.handle(events, now)
        if self._log is not None:
            self._log.record(now, events, actions)
        for action in actions:
            self._carry_out(action, now)

    def _carry_out(self, action: AnyAction, now: float) -> None:
        match action:
            case Emit(request_ids=request_ids):
                outputs = tuple(self._outputs[request_id] for request_id in request_ids)
                self._channel.send(StepOutput(outputs=outputs))
            case RunStep(step_id=step_id, chunks=chunks):
                work = tuple(Work(self._sequence(chunk.request_id), chunk) for chunk in chunks)
                self._steps.append((step_id, work))
            case OfferKv():
                self._offer(action)
            case Pull():
                self._pull(action, now)
            case ReleaseLease(request_id=request_id, epoch=epoch):
                self._channel.send(pulled_message(action, self._inbox.find(request_id, epoch), now))
            case Reject(request_id=request_id, epoch=epoch, detail=detail):
                self._inbox.drop(request_id, epoch)
                failed = Failed(request_id=request_id, epoch=epoch, kind=FailureKind.TOO_LONG, message=detail)
                self._channel.send(failed)
            case Finish(request_id=request_id, epoch=epoch, reason=reason):
                if reason is FinishReason.ERROR:
                    self._channel.send(failed_message(self._sequence(request_id)))
                self._inbox.drop(request_id, epoch)
            case WakeAt(time_s=time_s):
                self._wake_s = time_s
            case _:
                assert_never(action)

    def _offer(self, action: OfferKv) -> None:
        """Make the blocks readable and say where they are; from here on the sequence is another instance's."""
        self._executor.publish_blocks(action.block_ids)
        offer = KvOffer(
            request_id=action.request_id,
            epoch=action.epoch,
            source=self._ready.instance,
            incarnation=self._ready.incarnation,
            num_tokens=action.num_tokens,
            block_ids=action.block_ids,
            expires_s=action.expires_s,
            pool=self._ready.facts.pool,
        )
        self._channel.send(Offered(offer=offer))
        self._inbox.drop(action.request_id, action.epoch)

    def _pull(self, action: Pull, now: float) -> None:
        sequence = self._sequence(action.request_id)
        if sequence.offer is None:
            raise InternalError(f"the scheduler pulls {action.request_id}, which nobody offered")
        sequence.pull_started_s = now
        self._pulls.start(action, sequence.offer.pool, now)

    def _run_step(self) -> None:
        step_id, work = self._steps.popleft()
        started_s = self._clock.now()
        for item in work:
            item.sequence.start_step(item.chunk.start, started_s)
        results = self._executor.run(work)
        outputs = accept_results(work, results, self._clock.now())
        self._outputs = {output.request_id: output for output in outputs}
        self._step_done = StepDone(
            step_id=step_id,
            results=tuple(StepResult(output.request_id, output.finish_reason) for output in outputs),
            failed=tuple(item.sequence.request_id for item in work if item.sequence.failure is not None),
        )

    def _sequence(self, request_id: RequestId) -> LiveSequence:
        sequence = self._inbox.find(request_id)
        if sequence is None:
            raise InternalError(f"the scheduler knows sequence {request_id}, the engine does not")
        return sequence
