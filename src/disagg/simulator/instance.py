"""The simulated shell of one instance: the real step scheduler, a latency model for its steps, links for its pulls.

Like the live engine's loop it hands the scheduler everything that happened since the last turn, in the same order, and
carries out what it says. A turn comes when a step ends, and at once while the instance has room for one more step in
flight; what comes in between waits for the next turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Final, Protocol, assert_never

from disagg.base.config import SchedulerSettings
from disagg.base.errors import ConfigurationError
from disagg.base.ids import Epoch, InstanceId, RequestId
from disagg.base.messages import InstanceLoad
from disagg.base.request import Role
from disagg.base.sampling import FinishReason
from disagg.cache.block_pool import BlockAudit
from disagg.costs.contention import Activity, LatencyBeside
from disagg.costs.latency import LatencyModel, Pipeline, StepShape
from disagg.costs.links import LinkModel, SerialLinks
from disagg.costs.topology import Place
from disagg.measure.statistics import LogHistogram
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
from disagg.scheduling.step.events import AnyEvent, StepDone, StepResult, Tick, TransferDone
from disagg.scheduling.step.replay import LogHeader
from disagg.simulator.decode_run import DecodeRun
from disagg.simulator.event_log import SchedulerRecorder
from disagg.simulator.event_queue import EventQueue, Priority
from disagg.simulator.host import SimulatedHost
from disagg.simulator.repeating_scheduler import RepeatingScheduler
from disagg.simulator.request import SimulatedRequest
from disagg.simulator.timeline_page import TimelineRecorder
from disagg.simulator.usage import UsageSeries

MAX_RUN_LENGTH: Final = 64
"""Steps that are timed ahead: what an interruption throws away."""


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
    num_devices: int = 1
    place: Place = ()
    """Its devices; none named: devices of its own on the first node. A pipeline over several nodes counts as on that
    of its first stage, where hosts matter."""
    prefix_caching: bool = True
    swap: LinkModel | None = None
    """Where the KV of preempted sequences waits; None computes it again."""

    def __post_init__(self) -> None:
        if self.place and len(self.place) != self.num_devices:
            raise ConfigurationError(
                f"{self.name} has {self.num_devices} device(s) and a place of {len(self.place)}: name as many"
            )

    @property
    def capacity(self) -> int:
        """Longest sequence that the KV pool holds, in tokens."""
        return self.num_blocks * self.block_size

    def log_header(self) -> LogHeader:
        """Return what an event log needs to build the scheduler anew."""
        return LogHeader(
            settings=self.scheduler,
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            prefix_caching=self.prefix_caching,
        )


class InstanceListener(Protocol):
    """Whom an instance tells what came of its sequences."""

    def on_tokens(self, instance: InstanceId, requests: Sequence[SimulatedRequest]) -> None:
        """These requests got their first token here, or their last."""

    def on_offer(self, instance: InstanceId, offer: OfferKv) -> None:
        """A prefill is done and its KV blocks are leased."""

    def on_pull_ended(self, instance: InstanceId, release: ReleaseLease) -> None:
        """Offered blocks were read, or never will be."""

    def on_reject(self, instance: InstanceId, reject: Reject) -> None:
        """A sequence was not taken."""


class SimulatedInstance:
    """Drives one scheduler in virtual time."""

    def __init__(
        self,
        spec: InstanceSpec,
        queue: EventQueue,
        links: SerialLinks,
        listener: InstanceListener,
        recorder: SchedulerRecorder | None = None,
        *,
        host: SimulatedHost,
        timeline: TimelineRecorder | None = None,
        gaps: LogHistogram | None = None,
        step_by_step: bool = False,
    ) -> None:
        self.spec = spec
        self._queue = queue
        self._links = links
        self._listener = listener
        self._recorder = recorder
        self._timeline = timeline
        self._gaps = gaps
        self._may_repeat = not step_by_step and recorder is None and timeline is None
        self._scheduler = RepeatingScheduler(spec.scheduler, spec.num_blocks, spec.block_size, spec.prefix_caching)
        self._pipeline = Pipeline(spec.latency.num_stages)
        self._host = host
        self._activity: Activity | None = None
        self._step_tokens, self._step_s = 0, 0.0
        host.join(spec.name, self._end_equal_steps)
        self._requests: dict[RequestId, SimulatedRequest] = {}
        self._messages: list[AnyEvent] = []
        self._steps_done: list[AnyEvent] = []
        self._pulls_done: list[AnyEvent] = []
        self._num_in_flight = 0
        self._is_turn_due = False
        self._news: list[SimulatedRequest] = []
        self._run: DecodeRun | None = None
        self.kv_use = UsageSeries()
        """Blocks that sequences, leases and pulls hold, looked at whenever the scheduler is asked or books a run."""

    def take(self, request: SimulatedRequest, event: AnyEvent) -> None:
        """Receive a sequence: ``event`` says whether it starts here or continues."""
        request.has_started_here = False
        self._requests[request.request_id] = request
        self.deliver(event)

    def deliver(self, event: AnyEvent) -> None:
        """Receive an event; it is looked at in the next turn."""
        self._messages.append(event)
        self._request_turn()

    def unreported(self) -> list[SimulatedRequest]:
        """Return the requests with tokens, neither first nor last, that the dispatcher was not told of."""
        self.sync()
        return [
            request
            for request in self._requests.values()
            if 0 < request.num_reported_tokens < request.num_output_tokens and not request.is_complete
        ]

    def sync(self) -> None:
        """Book the steps of a run that have ended up to now."""
        if self._run is not None:
            self._book(self._run, self._run.num_ended(self._queue.now()))

    def load(self) -> InstanceLoad:
        """Return how busy the instance is, and its counters."""
        return self._scheduler.load()

    def audit(self) -> BlockAudit:
        """Count the blocks of each state."""
        return self._scheduler.audit()

    def validate(self) -> None:
        """Raise InternalError unless the scheduler's books agree."""
        self._scheduler.validate()

    # Turns --------------------------------------------------------------------------------------------------

    def _request_turn(self) -> None:
        self._end_equal_steps()
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
        self.kv_use.record(now, self._scheduler.num_held_blocks)
        if self._recorder is not None:
            self._recorder.record(now, events, actions)
        for action in actions:
            self._carry_out(action, now)
        activity = self._activity if self._num_in_flight else None
        self._host.set_activity(self.spec.name, activity, self._step_tokens, self._step_s)

    def _carry_out(self, action: AnyAction, now: float) -> None:
        match action:
            case RunStep():
                self._run_step(action, now)
            case Emit():
                if self._news:
                    self._listener.on_tokens(self.spec.name, self._news)
                    self._news = []
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
        for chunk in step.chunks:
            request = self._requests[chunk.request_id]
            if not request.has_started_here:
                request.start_step(now, self.spec.role)
        self._activity, self._step_tokens = Activity.of(shape), shape.num_samples
        latency = self._host.latency_now(self.spec.name, self.spec.latency)
        num_repeats = self._num_repeats(step, shape, latency)
        if num_repeats:
            self._run = DecodeRun(step, shape, latency, now, num_repeats)
            self._step_s = self._run.ends_s[0] - now
            self._queue.push(self._run.ends_s[-1], partial(self._end_run, self._run))
        else:
            end_s = self._pipeline.enter(now + swap_s, latency.stage_times_s(shape))
            self._step_s = end_s - now
            self._queue.push(end_s, partial(self._end_step, step))
            if self._timeline is not None:
                self._timeline.step(self.spec.name, now, end_s, shape)

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
                self._note_gap(request.add_tokens(1, now, now))
                reason = None
                if request.is_complete:
                    reason = FinishReason.LENGTH
                    self._news.append(request)
                elif request.num_output_tokens == 1:
                    self._news.append(request)
                results.append(StepResult(chunk.request_id, reason))
        self._steps_done.append(StepDone(step_id=step.step_id, results=tuple(results)))
        if not self._is_turn_due:
            self._is_turn_due = True
            self._queue.push(now, self._turn, Priority.TURN)

    def _note_gap(self, gap_s: float) -> None:
        # A first token has no gap before it, and a sampled one none after itself.
        if self._gaps is not None and gap_s > 0:
            self._gaps.add(gap_s)

    def _pull(self, action: Pull, now: float) -> None:
        num_bytes = len(action.copies) * self.spec.block_size * self.spec.kv_bytes_per_token
        end_s = self._links.start(action.source, self.spec.name, num_bytes, now)
        self._requests[action.request_id].timeline.pull_started_s = now
        if self._timeline is not None:
            self._timeline.pull(action.request_id, action.source, self.spec.name, now, end_s)
        self._queue.push(end_s, partial(self._end_pull, action.request_id, action.epoch))

    def _end_pull(self, request_id: RequestId, epoch: Epoch) -> None:
        self._requests[request_id].timeline.pulled_s = self._queue.now()
        self._pulls_done.append(TransferDone(request_id=request_id, epoch=epoch))
        self._request_turn()

    # Runs of equal decode steps -----------------------------------------------------------------------------

    def _num_repeats(self, step: RunStep, shape: StepShape, latency: LatencyModel) -> int:
        """Return how often a decode step that is about to start can be repeated before the scheduler is asked."""
        if not self._may_repeat or shape.num_prefills:
            return 0
        if isinstance(latency, LatencyBeside) and latency.is_for_one_step:
            return 0
        num_repeats = min(self._scheduler.num_repeats(), MAX_RUN_LENGTH)
        for request in self._requests_of(step):
            # A first and a last token are news, and only the end of a single step tells them.
            num_left = request.output_len - request.num_output_tokens - 1
            num_repeats = min(num_repeats, num_left if request.num_output_tokens else 0)
        return num_repeats

    def _requests_of(self, step: RunStep) -> list[SimulatedRequest]:
        return [self._requests[chunk.request_id] for chunk in step.chunks]

    def _book(self, run: DecodeRun, count: int) -> None:
        if count:
            step_id = self._scheduler.repeat(count)
            self.kv_use.record(self._queue.now(), self._scheduler.num_held_blocks)
            run.step = RunStep(step_id=step_id, chunks=run.step.chunks)
            ends_s = run.take(count)
            for request in self._requests_of(run.step):
                self._note_gap(request.add_tokens(count, ends_s[0], ends_s[-1]))
            if self._gaps is not None:
                for before_s, after_s in pairwise(ends_s):
                    self._gaps.add(after_s - before_s, len(run.step.chunks))

    def _end_equal_steps(self) -> None:
        """Something came, here or beside: the step in flight is its run's last, and its end asks the scheduler."""
        run = self._run
        if run is not None:
            self.sync()
            self._run = None
            self._queue.push(run.ends_s[0], partial(self._end_step, run.step))

    def _end_run(self, run: DecodeRun) -> None:
        if self._run is run:
            self._book(run, len(run.ends_s) - 1)
            self._run = None
            self._end_step(run.step)
