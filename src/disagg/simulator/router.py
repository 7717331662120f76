"""The simulated shell of the router's core: real decisions, delivered over a control plane with a constant delay."""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final, NamedTuple

from disagg.base.block_hash import names_for
from disagg.base.by_type import by_type
from disagg.base.config import RouterSettings
from disagg.base.errors import ConfigurationError
from disagg.base.event_log import EventLog
from disagg.base.ids import InstanceId, RequestId
from disagg.base.messages import Abort, Lend, Migrate, MoreKv, Offered, PartOffered, PeerLost, Release, ReportBlocks
from disagg.base.objectives import BEST_EFFORT
from disagg.base.request import Role
from disagg.scheduling.dispatch.actions import (
    Degrade,
    Deliver,
    Drained,
    Fail,
    FailReason,
    Finish,
    PathChosen,
    PathEnded,
    Refuse,
    Resume,
    SendAbort,
    SendGenerate,
    SendLend,
    SendMigrate,
    SendRelease,
)
from disagg.scheduling.dispatch.borrowing import lendable
from disagg.scheduling.dispatch.events import Join, ProcessStarting, SequenceArrived, SequenceCancelled, TokensEmitted
from disagg.scheduling.event_log import RouterRecord
from disagg.scheduling.instance.inputs import AnyInstanceInput, Continue, Expect, SequenceFacts, Start
from disagg.scheduling.replan.question import PlanAnswer, PlanQuestion
from disagg.scheduling.router.core import RouterCore
from disagg.scheduling.router.header import RouterHeader
from disagg.scheduling.router.inputs import AnyRouterInput, InstanceSaid, Planned, PlanningFailed, ProcessExited
from disagg.scheduling.router.outputs import (
    AddInstance,
    AnyRouterOutput,
    AskForBlocks,
    AskForPlan,
    AskToMeasure,
    ChangeWanted,
    EndInstance,
    GiveUpInstance,
    HandOverEnded,
    InstanceLeft,
    InstanceLost,
    InstanceWelcomed,
    LinkFound,
    MessageDropped,
    PlanDecided,
    ReportTenants,
    ReportWorkload,
    RestartInstance,
    ScalingDecided,
    SendOffer,
    SendPartOffer,
    SendWithPrefix,
    StopInstance,
    TellPeerLost,
)
from disagg.scheduling.step.actions import WakeAt
from disagg.scheduling.step.events import Tick
from disagg.simulator.event_log import EventLogFolder
from disagg.simulator.event_queue import EventQueue
from disagg.simulator.faults import InstanceDeath, TimedCommand
from disagg.simulator.instance import SimulatedInstance
from disagg.simulator.request import Outcome, SimulatedRequest

_DEATH: Final = "killed by the simulation"
_LEFT: Final = "it was removed"


_ForOthers = (
    PathChosen
    | MessageDropped
    | HandOverEnded
    | LinkFound
    | InstanceWelcomed
    | InstanceLost
    | EndInstance
    | GiveUpInstance
    | InstanceLeft
    | ReportWorkload
    | ReportTenants
    | ChangeWanted
    | Drained
)
"""What is for who counts and shows, or for processes."""
_WithSequence = SendGenerate | SendOffer | SendPartOffer | SendWithPrefix
"""What comes with the facts of a sequence."""


class SlowPlanner(NamedTuple):
    """Answers a question, after so many seconds."""

    answer: Callable[[PlanQuestion], PlanAnswer]
    takes_s: float


class SimulatedRouter:
    """Drives the router's core in virtual time."""

    def __init__(
        self,
        settings: RouterSettings,
        queue: EventQueue,
        on_ended: Callable[[SimulatedRequest], None],
        *,
        message_s: float = 0.0,
        log: EventLogFolder | None = None,
        instances_may_die: bool = False,
        start_spare_s: float = 1.0,
        planner: SlowPlanner | None = None,
    ) -> None:
        self._settings = settings
        self._queue = queue
        self._on_ended = on_ended
        self._message_s = message_s
        self._log = log
        # Where a message takes time, loads are those of when it was sent; a change of the fleet, or a prediction,
        # looks at all of them.
        self._compares_all = message_s > 0 or instances_may_die or settings.needs_costs
        # Where neither tenants take turns nor anybody looks at the workload, it does not matter whose tokens come.
        self._takes_sums = not (self._compares_all or settings.tenants or log is not None)
        self._start_spare_s = start_spare_s
        self._planner = planner
        self.decisions: list[tuple[float, ScalingDecided | PlanDecided]] = []
        """What the deployment decided of itself, and when."""
        self._recorder: EventLog | None = None
        self._instances: Mapping[InstanceId, SimulatedInstance] = {}
        self._compared: list[SimulatedInstance] = []
        self._requests: dict[RequestId, SimulatedRequest] = {}
        self._start_s: dict[InstanceId, float] = {}
        self._waiting: deque[AnyRouterInput] = deque()
        self._is_handling = False
        self._current: AnyRouterInput | None = None
        """What is being handled."""
        self._wake_s = math.inf

    def connect(self, instances: Sequence[SimulatedInstance], spares: Sequence[SimulatedInstance] = ()) -> None:
        """Let all instances come up but for the spares, which may join later."""
        self._instances = {instance.spec.name: instance for instance in (*instances, *spares)}
        self._unused = {spare.spec.name: spare for spare in spares}
        predicts = self._settings.needs_costs
        self._compared = [
            instance for instance in self._instances.values() if predicts or instance.spec.role is not Role.PREFILL
        ]
        roles = {instance.spec.name: instance.spec.role for instance in instances}
        # Simulated instances give no signs of life: their deaths are known at once.
        scheduler = instances[0].spec.scheduler
        header = RouterHeader(
            instances=roles, settings=self._settings, scheduler=scheduler, watches_silence=False, measures_links=True
        )
        self._core = RouterCore(header)
        if self._log is not None:
            self._recorder = self._log.router(header)
        for instance in instances:
            self._feed(InstanceSaid(instance=instance.spec.name, message=instance.spec.ready(instance.incarnation)))

    @property
    def num_requests(self) -> int:
        """Requests under way."""
        return len(self._requests)

    def submit(self, request: SimulatedRequest) -> None:
        """Take a request that arrives now."""
        arrived = SequenceArrived(
            request_id=request.request_id,
            epoch=request.epoch,
            num_tokens=request.prompt_len,
            max_total_tokens=request.max_total_tokens,
            priority=request.priority,
            tenant=request.tenant,
            service_class=request.service_class,
            objectives=request.objectives,
            block_hashes=request.prompt_names,
            hash_block_size=request.hash_block_size,
        )
        self._report_loads(arrived)
        self._requests[request.request_id] = request
        if request.cancel_s < math.inf:
            self._queue.push(max(request.cancel_s, self._queue.now()), partial(self._cancel, request))
        self._feed(arrived)

    def hear(self, said: AnyRouterInput) -> None:
        """Take what an instance says; it arrives after the control plane's delay."""
        if type(said) is InstanceSaid and isinstance(said.message, (Offered, PartOffered)):
            self._report_loads(said.message.offer.request_id)
        if self._message_s:
            self._queue.push(self._queue.now() + self._message_s, partial(self._feed, said))
        else:
            self._feed(said)

    def command(self, timed: TimedCommand) -> None:
        """Let an operator have her way, where it can be done."""
        command = timed.command
        try:
            self._feed(command)
        except ConfigurationError:
            return
        if isinstance(command, Join):
            self._unused.pop(command.instance, None)
            self._start_s[command.instance] = timed.start_s
            self._start_later(command.instance)

    def kill(self, death: InstanceDeath) -> None:
        """Let an instance die, now, if it belongs to the deployment and lives."""
        if not self._instances[death.instance].is_alive or self._core.members.get(death.instance) is None:
            return
        self._start_s[death.instance] = death.start_s
        self._instances[death.instance].kill()
        self._feed(ProcessExited(instance=death.instance, detail=_DEATH))

    def _cancel(self, request: SimulatedRequest) -> None:
        if request.outcome is None:
            for news in [instance.lose(request) for instance in self._instances.values()]:
                if news is not None:
                    self._feed(news)
            request.outcome = Outcome.CANCELLED
            self._feed(SequenceCancelled(request_id=request.request_id, epoch=request.epoch))

    def _report_loads(self, one: SequenceArrived | RequestId) -> None:
        """Tell the core how far the running answers are, before it compares instances for a sequence.

        First and last tokens are reported at once; those between only change the load of an instance, so they are
        reported together when that load is about to be looked at: never, where there is no choice. Loads grow
        meanwhile, so that one that is known and least decides, whatever the others have become.
        """
        if len(self._compared) < 2:
            return
        if self._compares_all:
            for instance in self._compared:
                self._report(instance)
            return
        while any(self._report(self._instances[entry.instance]) for entry in self._core.compared(one)):
            pass

    def _report(self, instance: SimulatedInstance) -> bool:
        """Tell the core how far an instance's answers are; return False when it knew."""
        news = instance.news(in_sum=self._takes_sums)
        if news is not None:
            self._feed(news)
        return news is not None

    # Deciding and telling -----------------------------------------------------------------------------------

    def _feed(self, one: AnyRouterInput) -> None:
        """Let the core handle one input, and then those that its outputs caused."""
        if self._is_handling:
            self._waiting.append(one)
            return
        self._is_handling = True
        now = self._queue.now()
        current: AnyRouterInput | None = one
        try:
            while current is not None:
                self._handle(current, now)
                current = self._waiting.popleft() if self._waiting else None
        finally:
            self._is_handling = False

    def _handle(self, current: AnyRouterInput, now: float) -> None:
        outputs = self._core.handle(current, now)
        if self._recorder is not None:
            self._recorder.record(RouterRecord(now, (current,), tuple(outputs)))
        self._current = current
        for output in outputs:
            _CARRIED_OUT_BY[type(output)](self, output, now)

    def _do_deliver(self, delivered: Deliver, now: float) -> None:
        """Count what a sequence that loses its instance goes on from."""
        emitted = self._current
        assert isinstance(emitted, TokensEmitted), "only a step's outputs are delivered"
        has_all = len(delivered.request_ids) == len(emitted.progress)
        for progress in emitted.progress:
            if has_all or progress.request_id in delivered.request_ids:
                self._requests[progress.request_id].num_delivered_tokens += progress.num_tokens

    def _do_finish(self, output: Finish, now: float) -> None:
        self._end(output.request_id, Outcome.FINISHED, now)

    def _do_fail(self, output: Fail, now: float) -> None:
        self._end(output.request_id, Outcome.FAILED, now, output.detail, output.reason)

    def _do_refuse(self, output: Refuse, now: float) -> None:
        self._end(output.request_id, Outcome.REFUSED, now, output.detail)

    def _do_note_path(self, output: PathEnded, now: float) -> None:
        self._requests[output.request_id].path_ended = output

    def _do_degrade(self, output: Degrade, now: float) -> None:
        self._requests[output.request_id].objectives = BEST_EFFORT

    def _do_resume(self, output: Resume, now: float) -> None:
        self._requests[output.request_id].resume(output.epoch, now)

    def _do_wake_up(self, output: WakeAt, now: float) -> None:
        self._wake_s = output.time_s
        self._queue.push(output.time_s, self._wake)

    def _do_restart(self, output: RestartInstance, now: float) -> None:
        self._queue.push(now + output.delay_s, partial(self._restart, output.instance))

    def _do_note_decision(self, output: ScalingDecided | PlanDecided, now: float) -> None:
        self.decisions.append((now, output))

    def _do_plan(self, output: AskForPlan, now: float) -> None:
        self._plan(output.question)

    def _do_add(self, output: AddInstance, now: float) -> None:
        self._queue.push(now, partial(self._add, output.role))

    def _do_stop(self, output: StopInstance, now: float) -> None:
        self._queue.push(now, partial(self._stop, output.instance))

    def _do_nothing(self, output: _ForOthers, now: float) -> None:
        pass

    def _wake(self) -> None:
        if self._queue.now() >= self._wake_s:
            self._wake_s = math.inf
            self._feed(Tick())

    def _restart(self, instance: InstanceId) -> None:
        if self._core.members.get(instance) is not None:
            self._feed(ProcessStarting(instance=instance))
            self._start_later(instance)

    def _plan(self, question: PlanQuestion) -> None:
        if self._planner is None:
            self._feed(PlanningFailed(why="nobody plans in this simulation"))
            return
        answer = self._planner.answer(question)
        self._queue.push(self._queue.now() + self._planner.takes_s, partial(self._feed, Planned(answer=answer)))

    def _add(self, role: Role) -> None:
        """Let a spare of this role join that has not been there; nothing happens without one."""
        name = next((name for name, one in self._unused.items() if one.spec.role is role), None)
        if name is not None:
            self.command(TimedCommand(self._queue.now(), Join(instance=name, role=role), self._start_spare_s))

    def _start_later(self, instance: InstanceId) -> None:
        self._queue.push(self._queue.now() + self._start_s[instance], partial(self._come_up, instance))

    def _come_up(self, instance: InstanceId) -> None:
        if self._core.members.get(instance) is not None:
            self._instances[instance].start()

    def _stop(self, instance: InstanceId) -> None:
        """End an instance that leaves."""
        self._instances[instance].kill()
        if self._core.members.get(instance) is not None:
            self._feed(ProcessExited(instance=instance, detail=_LEFT))

    def _send(self, call: Callable[[], None]) -> None:
        """Deliver a message, as it is now."""
        if self._message_s:
            self._queue.push(self._queue.now() + self._message_s, call)
        else:
            call()

    def _tell(self, instance: InstanceId, message: AnyInstanceInput) -> None:
        self._send(partial(self._instances[instance].deliver, message))

    def _give(self, output: _WithSequence, message: Start | Continue | Expect) -> None:
        """Send a sequence to an instance."""
        self._send(partial(self._instances[output.instance].take, self._requests[output.request_id], message))

    def _facts(self, output: _WithSequence) -> SequenceFacts:
        return self._requests[output.request_id].facts(self._instances[output.instance].spec.block_size)

    def _do_send_generate(self, output: SendGenerate, now: float) -> None:
        self._give(output, Start(sequence=self._facts(output), hand_over=output.hand_over))

    def _do_send_with_prefix(self, output: SendWithPrefix, now: float) -> None:
        self._give(output, Start(sequence=self._facts(output), hand_over=output.hand_over, prefix=output.prefix))

    def _do_send_offer(self, output: SendOffer, now: float) -> None:
        self._give(output, Continue(sequence=self._facts(output), offer=output.offer))

    def _do_send_part(self, output: SendPartOffer, now: float) -> None:
        if output.is_first:
            self._give(output, Expect(sequence=self._facts(output), offer=output.offer))
        else:
            self._tell(output.instance, MoreKv(offer=output.offer))

    def _do_send_lend(self, output: SendLend, now: float) -> None:
        prompt, size = self._requests[output.request_id], self._instances[output.instance].spec.block_size
        names = lendable(names_for(prompt.prompt_names, prompt.hash_block_size, size), prompt.prompt_len, size)
        self._tell(output.instance, Lend(request_id=output.request_id, epoch=output.epoch, block_hashes=names))

    def _do_send_abort(self, output: SendAbort, now: float) -> None:
        self._tell(output.instance, Abort(request_id=output.request_id, epoch=output.epoch))

    def _do_send_release(self, output: SendRelease, now: float) -> None:
        self._tell(output.instance, Release(request_id=output.request_id, epoch=output.epoch))

    def _do_send_migrate(self, output: SendMigrate, now: float) -> None:
        self._tell(output.instance, Migrate(request_id=output.request_id, epoch=output.epoch))

    def _do_tell_loss(self, output: TellPeerLost, now: float) -> None:
        self._tell(output.instance, PeerLost(instance=output.lost, incarnation=output.incarnation))

    def _do_ask_for_blocks(self, output: AskForBlocks, now: float) -> None:
        self._tell(output.instance, ReportBlocks())

    def _do_ask_to_measure(self, output: AskToMeasure, now: float) -> None:
        self._send(partial(self._instances[output.instance].measure_link, output.source, output.incarnation))

    def _end(
        self, request_id: RequestId, outcome: Outcome, now: float, detail: str = "", reason: FailReason | None = None
    ) -> None:
        request = self._requests.pop(request_id)
        request.outcome = request.outcome or outcome
        request.detail = detail
        request.fail_reason = reason
        request.timeline.finished_s = now
        self._on_ended(request)


_CARRIED_OUT_BY: Final = by_type(AnyRouterOutput, SimulatedRouter, "_do_")
