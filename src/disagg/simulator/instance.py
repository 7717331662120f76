"""The simulated shell of one instance: the real step scheduler, a latency model for its steps, links for its pulls.

Like the live engine's loop it hands the scheduler everything that happened since the last turn, in the same order, and
carries out what it says. A turn comes when a step ends, and at once while the instance has room for one more step in
flight; what comes in between waits for the next turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, assert_never

from disagg.base.config import SchedulerSettings
from disagg.base.ids import Epoch, InstanceId, RequestId
from disagg.base.request import Role
from disagg.base.sampling import FinishReason
from disagg.cache.block_pool import BlockAudit
from disagg.scheduling.actions import (
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
from disagg.scheduling.events import AnyEvent, StepDone, StepResult, Tick, TransferDone
from disagg.scheduling.step_scheduler import StepScheduler
from disagg.simulator.event_queue import EventQueue, Priority
from disagg.simulator.latency import LatencyModel, Pipeline, StepShape
from disagg.simulator.links import LinkModel, SerialLinks
from disagg.simulator.request import SimulatedRequest


@dataclass(frozen=True, kw_only=True)
class InstanceSpec:
    """What one simulated instance is made from."""

    name: InstanceId
    role: Role
    scheduler: SchedulerSettings
    num_blocks: int
    block_size: int
    latency: LatencyModel
    kv_bytes_per_token: int = 0
    prefix_caching: bool = True
    swap: LinkModel | None = None
    """Where the KV of preempted sequences waits; None computes it again."""

    @property
    def capacity(self) -> int:
        """Longest sequence that the KV pool holds, in tokens."""
        return self.num_blocks * self.block_size


class InstanceListener(Protocol):
    """Whom an instance tells what came of its sequences."""

    def on_tokens(self, instance: InstanceId, emitted: Sequence[SimulatedRequest], finished: set[RequestId]) -> None:
        """A step brought one token to each of ``emitted``."""

    def on_offer(self, instance: InstanceId, offer: OfferKv) -> None:
        """A prefill is done and its KV blocks are leased."""

    def on_pull_ended(self, instance: InstanceId, release: ReleaseLease) -> None:
        """Offered blocks were read, or never will be."""

    def on_reject(self, instance: InstanceId, reject: Reject) -> None:
        """A sequence was not taken."""


class CallRecorder(Protocol):
    """Receives every call of the scheduler, for the event log."""

    def record(self, now: float, events: Sequence[AnyEvent], actions: Sequence[AnyAction]) -> None:
        """Add one call."""


class SimulatedInstance:
    """Drives one scheduler in virtual time."""

    def __init__(
        self,
        spec: InstanceSpec,
        queue: EventQueue,
        links: SerialLinks,
        listener: InstanceListener,
        recorder: CallRecorder | None = None,
    ) -> None:
        self.spec = spec
        self._queue = queue
        self._links = links
        self._listener = listener
        self._recorder = recorder
        self._scheduler = StepScheduler(spec.scheduler, spec.num_blocks, spec.block_size, spec.prefix_caching)
        self._pipeline = Pipeline(spec.latency.num_stages)
        self._requests: dict[RequestId, SimulatedRequest] = {}
        self._messages: list[AnyEvent] = []
        self._steps_done: list[AnyEvent] = []
        self._pulls_done: list[AnyEvent] = []
        self._num_in_flight = 0
        self._is_turn_due = False
        self._finished: set[RequestId] = set()

    def take(self, request: SimulatedRequest, event: AnyEvent) -> None:
        """Receive a sequence: ``event`` says whether it starts here or continues."""
        self._requests[request.request_id] = request
        self.deliver(event)

    def deliver(self, event: AnyEvent) -> None:
        """Receive an event; it is looked at in the next turn."""
        self._messages.append(event)
        self._request_turn()

    def audit(self) -> BlockAudit:
        """Count the blocks of each state."""
        return self._scheduler.audit()

    def validate(self) -> None:
        """Raise InternalError unless the scheduler's books agree."""
        self._scheduler.validate()

    # Turns --------------------------------------------------------------------------------------------------

    def _request_turn(self) -> None:
        if not self._is_turn_due and self._num_in_flight < self.spec.scheduler.max_steps_in_flight:
            self._is_turn_due = True
            self._queue.push(self._queue.now(), self._turn, Priority.TURN)

    def _turn(self) -> None:
        """Let the scheduler decide once and do what it says."""
        self._is_turn_due = False
        now = self._queue.now()
        events = self._steps_done + self._messages + self._pulls_done
        self._steps_done, self._messages, self._pulls_done = [], [], []
        actions = self._scheduler.handle(events, now)
        if self._recorder is not None:
            self._recorder.record(now, events, actions)
        for action in actions:
            self._carry_out(action, now)

    def _carry_out(self, action: AnyAction, now: float) -> None:
        match action:
            case RunStep():
                self._run_step(action, now)
            case Emit(request_ids=request_ids):
                requests = self._requests
                self._listener.on_tokens(self.spec.name, [requests[name] for name in request_ids], self._finished)
                self._finished = set()
            case OfferKv(request_id=request_id):
                del self._requests[request_id]
                self._listener.on_offer(self.spec.name, action)
            case Pull():
                self._pull(action, now)
            case ReleaseLease():
                self._listener.on_pull_ended(self.spec.name, action)
            case Reject(request_id=request_id):
                del self._requests[request_id]
                self._listener.on_reject(self.spec.name, action)
            case Finish(request_id=request_id):
                self._requests.pop(request_id, None)
            case WakeAt(time_s=time_s):
                self._queue.push(time_s, partial(self.deliver, Tick()))
            case _:
                assert_never(action)

    # Steps and pulls ----------------------------------------------------------------------------------------

    def _run_step(self, step: RunStep, now: float) -> None:
        self._num_in_flight += 1
        shape, swap_s = self._price(step)
        end_s = self._pipeline.enter(now + swap_s, self.spec.latency.stage_times_s(shape))
        is_decode = self.spec.role is Role.DECODE
        for chunk in step.chunks:
            self._requests[chunk.request_id].start_step(now, is_decode)
        self._queue.push(end_s, partial(self._end_step, step))

    def _price(self, step: RunStep) -> tuple[StepShape, float]:
        """Return what the step computes, and the seconds to swap in what it need not compute again."""
        if self.spec.swap is None:
            return StepShape.of(step.chunks), 0.0
        shape, swap_s = StepShape(), 0.0
        for chunk in step.chunks:
            request = self._requests[chunk.request_id]
            end = chunk.start + chunk.num_tokens
            num_prompt = request.prompt_len
            if end > num_prompt and chunk.num_tokens > 1:
                swap_s += self.spec.swap.transfer_time_s((end - 1) * self.spec.kv_bytes_per_token)
            if end > num_prompt or chunk.num_tokens == 1:
                shape.num_decodes += 1
                shape.decode_context += end
                shape.num_samples += chunk.samples
            else:
                shape.add_prefill(chunk.start, chunk.num_tokens, chunk.samples)
        return shape, swap_s

    def _end_step(self, step: RunStep) -> None:
        self._num_in_flight -= 1
        now = self._queue.now()
        results = []
        for chunk in step.chunks:
            if chunk.samples:
                request = self._requests[chunk.request_id]
                is_last = request.add_token(now)
                if is_last:
                    self._finished.add(chunk.request_id)
                results.append(StepResult(chunk.request_id, FinishReason.LENGTH if is_last else None))
        self._steps_done.append(StepDone(step_id=step.step_id, results=tuple(results)))
        if not self._is_turn_due:
            self._is_turn_due = True
            self._queue.push(now, self._turn, Priority.TURN)

    def _pull(self, action: Pull, now: float) -> None:
        num_bytes = len(action.copies) * self.spec.block_size * self.spec.kv_bytes_per_token
        end_s = self._links.start(action.source, self.spec.name, num_bytes, now)
        self._requests[action.request_id].timeline.pull_started_s = now
        self._queue.push(end_s, partial(self._end_pull, action.request_id, action.epoch))

    def _end_pull(self, request_id: RequestId, epoch: Epoch) -> None:
        self._requests[request_id].timeline.pulled_s = self._queue.now()
        self._pulls_done.append(TransferDone(request_id=request_id, epoch=epoch))
        self._request_turn()
