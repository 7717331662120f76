"""The simulated shell of an instance's core: a latency model for its steps, links for its pulls, a heap for its time.

Like the live engine's loop it hands the core everything that happened since the last turn, in the same order, and
carries out what it says. A turn comes when a step ends, and at once while the instance has room for one more step in
flight; what comes in between waits for the next turn.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from disagg.base.by_type import by_type
from disagg.base.event_log import EventLog
from disagg.base.ids import InstanceId, RequestId
from disagg.base.messages import (
    Audited,
    CostsLearned,
    Failed,
    InstanceLoad,
    NotHeld,
    Offered,
    PartOffered,
    Pulled,
    StageStamps,
)
from disagg.cache.block_pool import BlockAudit
from disagg.costs.coded_links import CodedLinks
from disagg.costs.contention import Activity, LatencyBeside, LatencyOnMore
from disagg.costs.latency import LatencyModel, Pipeline
from disagg.costs.links import SerialLinks
from disagg.scheduling.dispatch.events import TokensEmitted
from disagg.scheduling.event_log import InstanceRecord
from disagg.scheduling.instance.core import InstanceCore
from disagg.scheduling.instance.inputs import AnyInstanceInput, Continue, CopyEnded, Expect, Start
from disagg.scheduling.instance.outputs import (
    AnyInstanceOutput,
    CacheChanged,
    CancelCopy,
    Emitted,
    FirstOutput,
    ForgetPeer,
    StartCopy,
)
from disagg.scheduling.router.inputs import AnyRouterInput, InstanceSaid
from disagg.scheduling.step.actions import DropSaved, Forget, LoadBlocks, RunStep, SaveBlock, WakeAt
from disagg.scheduling.step.events import StepDone, Tick
from disagg.simulator.copies import Copies
from disagg.simulator.decode_batch import DecodeBatch
from disagg.simulator.decode_run import MOST_STEPS, DecodeRun
from disagg.simulator.digest_work import DigestWork
from disagg.simulator.event_queue import EventQueue
from disagg.simulator.faults import Faults
from disagg.simulator.held_requests import HeldRequests
from disagg.simulator.host import SimulatedHost
from disagg.simulator.instance_spec import InstanceSpec
from disagg.simulator.link_figure import link_measured
from disagg.simulator.paced_steps import PacedSteps
from disagg.simulator.recording import Recording
from disagg.simulator.request import FIRST_EPOCH, SimulatedRequest, add_tokens, tokens_emitted
from disagg.simulator.step_ends import StepEnds
from disagg.simulator.tier_clock import TierClock
from disagg.simulator.usage import UsageSeries


class SimulatedInstance:
    """Drives the core of one instance in virtual time, over all its lives. ``tell`` takes messages to the router."""

    def __init__(
        self,
        spec: InstanceSpec,
        queue: EventQueue,
        links: SerialLinks | CodedLinks,
        tell: Callable[[AnyRouterInput], None],
        *,
        host: SimulatedHost,
        step_ends: StepEnds,
        faults: Faults | None = None,
        recording: Recording,
    ) -> None:
        self.spec = spec
        self._queue = queue
        self._links = links
        self._tell = tell
        self._host = host
        self._step_ends = step_ends
        faults = faults or Faults()
        self._failing_pulls = set(faults.failing_pulls)
        self._may_die = bool(faults.commands) or any(death.instance == spec.name for death in faults.deaths)
        self._log = recording.log
        self._timeline = recording.timeline
        self._gaps = recording.gaps
        # What it computed is lost with it unless the router was told: an instance that may die, or give its answers
        # away, tells every token at once. Where predictions decide, every token's load counts.
        self._tells_all = self._may_die or spec.scheduler.tells_costs
        self._may_repeat = recording.allows_repeats and not self._tells_all
        self._life = -1
        self._loads_before: list[InstanceLoad] = []
        self.kv_use = UsageSeries()
        """Blocks that sequences, leases and pulls hold, looked at whenever the core is asked or books a run."""
        host.join(spec.name, self._end_equal_steps, spec.num_threads)
        if spec.cores is not None:
            host.lend_among(spec.name, spec.cores, self._change_pace)
        self._begin_life()

    # Lives --------------------------------------------------------------------------------------------------

    def _begin_life(self) -> None:
        self._life += 1
        spec = self.spec
        header = spec.header(self.incarnation)
        self._core = InstanceCore(header)
        self._recorder: EventLog | None = None if self._log is None else self._log.instance(header, self._life)
        self._pipeline = Pipeline(spec.latency.num_stages)
        self._activity: Activity | None = None
        self._step_tokens, self._step_s = 0, 0.0
        self._requests = HeldRequests(spec.block_size)
        self._messages: list[AnyInstanceInput] = []
        self._steps_done: list[AnyInstanceInput] = []
        self._pulls_done: list[AnyInstanceInput] = []
        self._tiers_done: list[AnyInstanceInput] = []
        self._num_in_flight = 0
        self._is_turn_due = False
        self._wake_s = math.inf
        self._digests, self._busy_s = DigestWork(spec.digest_s), 0.0
        self._copies = Copies(
            spec.name, self._links, self._step_ends, self._failing_pulls, self._later, self._end_copy, self._timeline
        )
        self._tiers = TierClock(spec)
        self._run: DecodeRun | None = None
        self._paused: DecodeRun | None = None  # interrupted last: it may be what comes next
        self._batch: DecodeBatch | None = None
        """What the step in flight decodes, where that can be repeated, or was."""
        self._num_told = 0
        """Tokens that the router knows of in sum alone."""
        self._paced = None if spec.cores is None else self._new_paced_steps()
        """Its steps, where they borrow cores."""
        self.is_alive = True

    def _new_paced_steps(self) -> PacedSteps:
        return PacedSteps(
            self.spec, self.incarnation, self._host, self._step_ends, self._later, self._end_step, self._timeline
        )

    @property
    def incarnation(self) -> str:
        """Name of its present life."""
        return f"{self.spec.name}.{self._life}"

    def start(self) -> None:
        """Say that it takes requests; a dead instance begins a new life."""
        if not self.is_alive:
            self._begin_life()
        self._tell(InstanceSaid(instance=self.spec.name, message=self.spec.ready(self.incarnation)))

    def kill(self) -> None:
        """End this life: what it computed, pulled and held is gone."""
        self.sync()
        self._dissolve()
        self._run = None
        self._loads_before.append(self._core.load())
        self.is_alive = False
        self._requests = HeldRequests(self.spec.block_size)
        self.kv_use.record(self._queue.now(), 0)
        self._copies.drop()
        if self._paced is not None:
            self._paced.drop()
        self._host.set_activity(self.spec.name, None)

    def _later(self, time_s: float, call: Callable[[], None]) -> None:
        """Make a call at ``time_s``, unless this life has ended by then."""
        self._queue.push(time_s, partial(self._call_in_life, self._life, call) if self._may_die else call)

    def _call_in_life(self, life: int, call: Callable[[], None]) -> None:
        if self.is_alive and self._life == life:
            call()

    # Messages -----------------------------------------------------------------------------------------------

    def take(self, request: SimulatedRequest, message: Start | Continue | Expect) -> None:
        """Receive a sequence: the message says whether it starts here or continues."""
        if self.is_alive:
            self._requests.take(request, message)
            self.deliver(message)

    def deliver(self, message: AnyInstanceInput) -> None:
        """Receive a message; it is looked at in the next turn."""
        if self.is_alive:
            self._messages.append(message)
            self._request_turn()

    def measure_link(self, source: InstanceId, source_incarnation: str) -> None:
        """Tell how fast the KV pool of another instance is read: what is known of the link, at no cost."""
        if not self.is_alive:
            return
        own = self.spec.name, self.incarnation
        measured = link_measured(self._links, (source, source_incarnation), own)
        self._tell(InstanceSaid(instance=self.spec.name, message=measured))

    def news(self, *, in_sum: bool) -> TokensEmitted | None:
        """Return what the router was not told of the answers under way here, neither first nor last tokens.

        ``in_sum`` says that it need not know whose they are. None when it knows.
        """
        name, batch = self.spec.name, self._batch
        if in_sum and batch is not None and batch.is_told_in_sum:
            ahead = 0 if self._run is None else self._run.num_ended(self._queue.now())
            num_told, self._num_told = self._num_told, batch.num_untold_after(ahead)
            is_new = num_told != self._num_told
            return TokensEmitted(instance=name, progress=(), num_untold=self._num_told) if is_new else None
        if batch is not None:
            self.sync()
            batch.settle()
        unreported = self._requests.unreported()
        num_told, self._num_told = self._num_told, 0
        return tokens_emitted(name, unreported) if unreported or num_told else None

    def lose(self, request: SimulatedRequest) -> TokensEmitted | None:
        """A client goes away: its request has the tokens that came until now; return what the router is to know first.

        Until the batch is another one, no sum of it says what those bring that stay.
        """
        if self._batch is None or request not in self._requests:
            return None
        self._batch.is_told_in_sum = False
        return self.news(in_sum=False)

    def sync(self) -> None:
        """Book the steps of a run that have ended up to now."""
        if self._run is not None:
            self._book(self._run, self._run.num_ended(self._queue.now()))

    def load(self) -> InstanceLoad:
        """Return how busy the instance is, and the counters of its present life."""
        return self._core.load()

    def loads(self) -> list[InstanceLoad]:
        """Return the counters of all its lives."""
        return self._loads_before + ([self._core.load()] if self.is_alive else [])

    def audit(self) -> BlockAudit:
        """Count the blocks of each state."""
        return self._core.audit()

    def validate(self) -> None:
        """Raise InternalError unless the core's books agree."""
        self._core.validate()

    # Turns --------------------------------------------------------------------------------------------------

    def _request_turn(self) -> None:
        if self._run is not None:
            self._end_equal_steps()
        if not self._is_turn_due and self._num_in_flight < self.spec.scheduler.max_steps_in_flight:
            self._plan_turn()

    def _wake(self) -> None:
        if self._queue.now() >= self._wake_s:
            self._request_turn()

    def _plan_turn(self) -> None:
        self._is_turn_due = True
        turn = self._turn
        if self._busy_s > self._queue.now():
            self._later(self._busy_s, turn)
            return
        self._queue.push_turn(partial(self._call_in_life, self._life, turn) if self._may_die else turn)

    def _turn(self) -> None:
        """Let the core decide once and do what it says."""
        self._is_turn_due = False
        now = self._queue.now()
        inputs, self._steps_done = self._steps_done, []
        for waiting in (self._messages, self._pulls_done, self._tiers_done):
            if waiting:
                inputs += waiting
                waiting.clear()
        if now >= self._wake_s:
            self._wake_s = math.inf
            inputs.append(Tick())
        outputs = self._core.handle(inputs, now)
        self.kv_use.record(now, self._core.num_held_blocks)
        if self._recorder is not None:
            self._recorder.record(InstanceRecord(now, tuple(inputs), tuple(outputs)))
        self._busy_s = now
        for output in outputs:
            _CARRIED_OUT_BY[type(output)](self, output, self._busy_s)
        if not self._num_in_flight:
            self._dissolve()
            if self._paced is not None:
                self._host.lend(self.spec.name)
        if self._host.is_shared:
            activity = self._activity if self._num_in_flight else None
            self._host.set_activity(self.spec.name, activity, self._step_tokens, self._step_s)

    def _do_offer(self, message: Offered | PartOffered, now: float) -> None:
        self._busy_s = now + self._digests.time_s(message)  # what is left to do waits for that, too
        self._say(InstanceSaid(instance=self.spec.name, message=message), self._busy_s)

    def _do_say(self, message: NotHeld | Pulled | Failed | CostsLearned, now: float) -> None:
        self._say(InstanceSaid(instance=self.spec.name, message=message), now)

    def _do_tell_blocks(self, output: CacheChanged, now: float) -> None:
        self._say(InstanceSaid(instance=self.spec.name, message=output.message), now)

    def _say(self, said: AnyRouterInput, now: float) -> None:
        if now > self._queue.now():
            self._later(now, partial(self._tell, said))
        else:
            self._tell(said)

    def _do_copy(self, output: StartCopy, now: float) -> None:
        self._copies.start(output, self.spec.copied_bytes(output), now)

    def _do_use_tier(self, output: LoadBlocks | SaveBlock, now: float) -> None:
        end_s, ended = (
            self._tiers.read(output, now) if isinstance(output, LoadBlocks) else self._tiers.write(output, now)
        )
        self._later(end_s, partial(self._end_tier, ended))

    def _do_forget(self, output: Forget, now: float) -> None:
        self._requests.forget(output)
        self._digests.forget(output)

    def _do_nothing(self, output: CancelCopy | DropSaved | Audited, now: float) -> None:
        """A copy under way takes its time all the same, and removing files none."""

    def _do_forget_peer(self, output: ForgetPeer, now: float) -> None:
        self._copies.lose(output.incarnation)

    def _do_wake_up(self, output: WakeAt, now: float) -> None:
        self._wake_s = output.time_s
        self._later(output.time_s, self._wake)

    def _do_emit(self, output: Emitted, now: float) -> None:
        """Stamp new tokens. First and last ones are news; the router is told of others when it compares instances.

        So is the first of a resumed sequence: it may be all that comes from here before its offer.
        """
        stamps = _stamps_of(output.firsts) if output.firsts else {}
        requests = self._requests.of(output.request_ids)
        if self._batch is not None:
            self._batch.note_fresh(1, now, now, stamps)
        else:
            gaps_s = add_tokens(requests, 1, now, now, stamps)
            if self._gaps is not None:
                self._gaps.add_all(gaps_s)
        news, tells_all = [], self._tells_all
        for request in requests:
            count = request.num_output_tokens
            resumed_here = bool(stamps) and request.epoch != FIRST_EPOCH and request.request_id in stamps
            if tells_all or count == 1 or count >= request.output_len or resumed_here:
                news.append(request)
        if news:
            self._num_told = self._batch.num_untold_after(0) if self._num_told and self._batch is not None else 0
            self._say(tokens_emitted(self.spec.name, news, self._num_told), now)

    # Steps and pulls ----------------------------------------------------------------------------------------

    def _do_run_step(self, step: RunStep, now: float) -> None:
        self._num_in_flight += 1
        if step.num_standing and self._batch is not None:
            self._batch.join(self._requests_of(step))
        else:
            self._dissolve()
        shape, swap_s = self.spec.price(step, self._requests) if self._batch is None else (self._batch.shape, 0.0)
        latency = self.spec.latency
        if self._host.is_shared:
            self._activity, self._step_tokens = Activity.of(shape), shape.num_samples
        if self._paced is not None:
            latency = self._paced.begin(step)
        elif self._host.is_shared:
            latency = self._host.latency_now(self.spec.name, latency)
        num_repeats = 0 if shape.num_prefills or not self._may_repeat else self._num_repeats(step, latency)
        if num_repeats:
            self._run, self._paused = self._paused, None
            if self._run is None or not self._run.goes_on(step, latency, num_repeats, now):
                self._run = DecodeRun(step, shape, latency, now, num_repeats)
                self._later(self._run.ends_s[-1], partial(self._end_run, self._run))
            self._step_s = self._run.ends_s[0] - now
        elif self._paced is not None:
            self._step_s = self._paced.run(step, shape, now) - now
        else:
            stage_times_s = latency.stage_times_s(shape)
            end_s = self._pipeline.enter(now + swap_s, stage_times_s)
            self._step_s = end_s - now
            if self.spec.shows_progress:
                self._step_ends.note(self.spec.name, self.incarnation, step.step_id, end_s)
            self._later(end_s, partial(self._end_step, step, swap_s + sum(stage_times_s)))
            if self._timeline is not None:
                self._timeline.step(self.spec.name, now, end_s, shape)

    def _end_step(self, step: RunStep, duration_s: float, borrowed_s: float = 0.0) -> None:
        self._num_in_flight -= 1
        if self._paced is not None:
            self._host.end_step(self.spec.name)
        batch, now = self._batch, self._queue.now()
        results = self._requests.count_tokens(step.chunks) if batch is None else batch.finish(now)
        done = StepDone(step_id=step.step_id, results=tuple(results), duration_s=duration_s, borrowed_s=borrowed_s)
        self._steps_done.append(done)
        if not self._is_turn_due:
            self._plan_turn()

    def _end_tier(self, ended: AnyInstanceInput) -> None:
        self._tiers_done.append(ended)
        self._request_turn()

    def _end_copy(self, ended: CopyEnded) -> None:
        self._pulls_done.append(ended)
        self._request_turn()

    # Runs of equal decode steps -----------------------------------------------------------------------------

    def _num_repeats(self, step: RunStep, latency: LatencyModel) -> int:
        """Return how often a step of decodes alone can be repeated before the scheduler is asked."""
        if self._host.is_shared and isinstance(latency, (LatencyBeside, LatencyOnMore)) and latency.is_for_one_step:
            return 0
        if self._paced is not None and self._host.is_waited_for(self.spec.name):
            return 0
        num_repeats = self._core.num_repeats()
        if not num_repeats:
            return 0
        batch = self._batch or DecodeBatch(self._requests_of(step), self.spec.block_size, self._gaps)
        num_repeats = min(num_repeats, batch.num_repeats)
        if num_repeats and self._batch is None:
            self._batch = batch
            # One that was preempted has tokens, too, that the router was not told of, and is in no batch.
            batch.is_told_in_sum = all(request in batch for request in self._requests.unreported())
        return num_repeats

    def _requests_of(self, step: RunStep) -> list[SimulatedRequest]:
        return self._requests.of([chunk.request_id for chunk in step.chunks])

    def _dissolve(self) -> None:
        """The batch is another one: its requests have what it has brought them."""
        if self._batch is not None:
            self._batch.settle()
            self._batch = None

    def _book(self, run: DecodeRun, count: int, *, is_over: bool = False) -> None:
        """Book the next ``count`` ends of steps of a run; when it ``is_over``, no step is in flight after them."""
        batch = self._batch
        if not count or batch is None:
            return
        run.step, firsts = self._core.repeat(count, run.ends_s[0], batch.count(count), is_over=is_over)
        self.kv_use.record(self._queue.now(), self._core.num_held_blocks)
        batch.note_times(count, run.take(count), _stamps_of(firsts) if firsts else {})

    def _change_pace(self) -> None:
        """The step in flight goes on with more or fewer cores: a run ends with it."""
        now, run = self._queue.now(), self._run
        if self._paced is None:
            return
        if run is not None:
            self._book(run, run.num_ended(now))
            self._run = None
            self._paced.run(run.step, run.shape_in_flight(), run.started_s)
        self._paced.change(now)

    def _end_equal_steps(self) -> None:
        """Something came, here or beside: the step in flight is its run's last, and its end asks the scheduler."""
        run = self._run
        if run is not None and not run.is_interrupted:
            run.is_interrupted = True
            self._later(run.ends_s[run.num_ended(self._queue.now())], partial(self._end_interrupted, run))

    def _end_interrupted(self, run: DecodeRun) -> None:
        """End a run before its time, in one go with all its steps that nobody has asked for."""
        if self._run is run:
            count = run.num_ended(self._queue.now()) + 1
            is_last = run.is_last(count)
            self._book(run, count - is_last, is_over=not is_last)
            self._run = None
            if is_last:
                self._end_step(run.step, run.ends_s[0] - run.started_s)
            else:
                self._paused = run
                self._num_in_flight -= 1
                if self._paced is not None:
                    self._host.end_step(self.spec.name)
                self._plan_turn()

    def _end_run(self, run: DecodeRun) -> None:
        if self._run is not run or run.is_interrupted:
            return
        if run.is_complete or len(run.ends_s) >= MOST_STEPS:
            self._book(run, len(run.ends_s) - 1)
        if run.is_complete:
            self._run = None
            self._end_step(run.step, run.ends_s[-1] - run.started_s)
        else:
            run.extend()
            self._later(run.ends_s[-1], partial(self._end_run, run))


def _stamps_of(firsts: Sequence[FirstOutput]) -> dict[RequestId, StageStamps]:
    return {first.request_id: first.stamps for first in firsts}


_CARRIED_OUT_BY: Final = by_type(AnyInstanceOutput, SimulatedInstance, "_do_")
