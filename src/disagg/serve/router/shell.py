"""The live shell of the router's core: feeds it under the real clock, carries out what it says over a real socket."""

import asyncio
import logging
from collections import deque
from collections.abc import Mapping
from typing import Final, assert_never

from disagg.base.block_hash import names_for
from disagg.base.clock import Clock
from disagg.base.errors import (
    ContextLengthError,
    DisaggError,
    InstanceLostError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    RequestTimeoutError,
    UnavailableError,
)
from disagg.base.event_log import EventLog
from disagg.base.ids import BlockHash, InstanceId, RequestId
from disagg.base.message_fields import Message
from disagg.base.messages import (
    Abort,
    Adopt,
    Generate,
    Lend,
    MeasureLink,
    Migrate,
    MoreKv,
    PeerLost,
    Release,
    ReportBlocks,
    Reserve,
    SequenceOutput,
    Stop,
    encode,
)
from disagg.base.request import GenerationRequest
from disagg.measure.timeline import RequestTimeline
from disagg.scheduling.dispatch.actions import (
    Degrade,
    Deliver,
    Drained,
    Fail,
    FailReason,
    Finish,
    PathEnded,
    Refuse,
    RefuseReason,
    Resume,
    SendAbort,
    SendGenerate,
    SendLend,
    SendMigrate,
    SendRelease,
)
from disagg.scheduling.dispatch.borrowing import lendable
from disagg.scheduling.dispatch.events import Progress, SequenceArrived, SequenceCancelled, TokensEmitted
from disagg.scheduling.event_log import RouterRecord
from disagg.scheduling.replan.question import PlanQuestion
from disagg.scheduling.router.core import RouterCore
from disagg.scheduling.router.inputs import AnyRouterInput, PlanningFailed, Unreachable
from disagg.scheduling.router.outputs import (
    AddInstance,
    AnyRouterOutput,
    AnySend,
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
from disagg.serve.router.control_socket import ControlSocket
from disagg.serve.router.effects import NO_EFFECTS
from disagg.serve.router.record import LiveStream, SequenceRecord
from disagg.serve.router.sink import RouterSink
from disagg.serve.router.watcher import InstanceWatcher, NullWatcher

logger = logging.getLogger(__name__)

_ERRORS: Final[dict[FailReason, type[DisaggError]]] = {
    FailReason.INSTANCE_LOST: InstanceLostError,
    FailReason.UNAVAILABLE: UnavailableError,
    FailReason.TIMEOUT: RequestTimeoutError,
    FailReason.TOO_LONG: ContextLengthError,
    FailReason.INVALID: InvalidRequestError,
    FailReason.INTERNAL: InternalError,
}


class RouterShell:
    """One core and the records of the sequences that it decides on. Nothing here waits."""

    def __init__(
        self, core: RouterCore, socket: ControlSocket, *, clock: Clock, sink: RouterSink, event_log: EventLog | None
    ) -> None:
        self.watcher: InstanceWatcher = NullWatcher()
        self.effects = NO_EFFECTS
        """Who brings about what is decided beyond the instances that there are."""
        self._core = core
        self._socket = socket
        self._clock = clock
        self._sink = sink
        self._event_log = event_log
        self._records: dict[RequestId, SequenceRecord] = {}
        self._waiting: deque[tuple[AnyRouterInput, Mapping[RequestId, SequenceOutput]]] = deque()
        self._handling = False
        self._wake_up: asyncio.TimerHandle | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    def submit(self, request: GenerationRequest) -> LiveStream:
        """Take a sequence; raise OverloadedError or UnavailableError when the core refuses it."""
        if request.request_id in self._records:
            raise InternalError(f"sequence {request.request_id} was submitted twice")
        timeline = RequestTimeline(arrival_s=request.arrival_s or self._clock.now())
        stream = LiveStream(timeline, self._clock)
        self._records[request.request_id] = SequenceRecord(request, stream)
        self._idle.clear()
        self.feed(
            SequenceArrived(
                request_id=request.request_id,
                epoch=request.epoch,
                num_tokens=request.num_tokens,
                max_total_tokens=request.max_total_tokens,
                priority=request.priority,
                tenant=request.tenant,
                service_class=request.service_class,
                objectives=request.objectives,
                block_hashes=request.block_hashes,
                hash_block_size=request.hash_block_size,
                prepared_s=max(0.0, self._clock.now() - timeline.arrival_s),
            )
        )
        if stream.refusal is not None:
            raise stream.refusal
        return stream

    def cancel(self, request_id: RequestId, error: DisaggError | None = None) -> None:
        """End a sequence wherever it is; its reader gets ``error``. Unknown ids are ignored."""
        record = self._records.get(request_id)
        if record is None:
            return
        if error is not None:
            record.stream.end(error)
        self.feed(SequenceCancelled(request_id=request_id, epoch=record.request.epoch))

    def cancel_all(self, error: DisaggError) -> None:
        """End every sequence with this error."""
        for request_id in list(self._records):
            self.cancel(request_id, error)

    async def wait_until_idle(self) -> None:
        """Return once no sequence is under way."""
        await self._idle.wait()

    def emit(self, instance: InstanceId, outputs: tuple[SequenceOutput, ...]) -> None:
        """Take what a step of ``instance`` brought."""
        progress = tuple(
            Progress(output.request_id, output.epoch, len(output.token_ids), output.finish_reason is not None)
            for output in outputs
        )
        by_id = {output.request_id: output for output in outputs}
        self.feed(TokensEmitted(instance=instance, progress=progress), by_id)

    def feed(self, one: AnyRouterInput, outputs: Mapping[RequestId, SequenceOutput] | None = None) -> None:
        """Let the core handle this, and what carrying out its outputs causes; raise what the core raises."""
        self._waiting.append((one, outputs or {}))
        if self._handling:
            return
        self._handling = True
        try:
            while self._waiting:
                self._handle(*self._waiting.popleft())
        finally:
            self._handling = False
        if not self._records:
            self._idle.set()

    def tick(self) -> None:
        """Let the core see what time it is. A timer calls this; it is public for tests of time."""
        self._wake_up = None
        self.feed(Tick())

    def close(self) -> None:
        """Forget the wake-up and end the log. Call ``cancel_all`` before."""
        if self._wake_up is not None:
            self._wake_up.cancel()
        if self._event_log is not None:
            self._event_log.close()

    def _handle(self, one: AnyRouterInput, values: Mapping[RequestId, SequenceOutput]) -> None:
        now = self._clock.now()
        outputs = self._core.handle(one, now)
        if self._event_log is not None:
            self._event_log.record(RouterRecord(now, (one,), tuple(outputs)))
        for output in outputs:
            match output:
                case Deliver(request_ids=request_ids):
                    assert isinstance(one, TokensEmitted), "only a step's outputs are delivered"
                    for request_id in request_ids:
                        pause_s = self._records[request_id].accept(values[request_id], one.instance, now)
                        if pause_s is not None:
                            self._sink.pause_ended(pause_s)
                case Resume(request_id=request_id, epoch=epoch, why=why):
                    logger.warning("sequence %s goes on elsewhere in epoch %d: %s", request_id, epoch, why)
                    self._records[request_id].resume(epoch, now)
                    self._sink.sequence_resumed()
                case Finish(request_id=request_id):
                    self._records.pop(request_id).stream.end()
                case Fail(request_id=request_id, reason=reason, detail=detail):
                    self._records.pop(request_id).stream.end(_ERRORS[reason](detail))
                case Refuse(request_id=request_id):
                    record = self._records.pop(request_id)
                    self._sink.sequence_refused(output.reason, output.priority, record.request.service_class)
                    record.stream.refuse(_refusal(output))
                case WakeAt(time_s=time_s):
                    self._wake_at(time_s, now)
                case _ if isinstance(output, AnySend):
                    self._send(output)
                case _:
                    self._report(output)

    def _report(self, output: AnyRouterOutput) -> None:
        """Tell whoever counts, shows and runs the instances."""
        match output:
            case MessageDropped(instance=instance, reason=reason):
                self._sink.message_dropped(instance, reason)
            case HandOverEnded():
                self._sink.hand_over_ended(output)
            case LinkFound():
                self._sink.link_found(output)
            case InstanceWelcomed(instance=instance):
                facts = self._core.members[instance].facts
                assert facts is not None, "a welcomed instance has said what it is"
                self.watcher.instance_ready(instance, facts)
            case InstanceLost(instance=instance):
                self._sink.instance_lost(instance)
            case EndInstance(instance=instance, why=why):
                logger.error("instance %s is treated as dead: %s", instance, why)
                self.watcher.instance_faulty(instance, why)
            case RestartInstance(instance=instance, delay_s=delay_s):
                self.watcher.restart_instance(instance, delay_s)
            case GiveUpInstance(instance=instance, nothing_left=nothing_left):
                self.watcher.give_up_instance(instance, nothing_left)
            case Degrade(request_id=request_id, why=why):
                logger.debug("sequence %s is served as best effort: %s", request_id, why)
                record = self._records[request_id]
                record.degrade()
                self._sink.sequence_degraded(record.request.service_class)
            case PathEnded():
                self._sink.path_ended(output)
            case _:
                self._report_change(output)

    def _report_change(self, output: AnyRouterOutput) -> None:
        """Tell who comes and who goes."""
        match output:
            case ScalingDecided():
                logger.info("autoscaling: %s", output.words)
            case AddInstance(role=role):
                self.effects.add_instance(role)
            case ChangeWanted(command=command):
                self.effects.change_fleet(command)
            case ReportWorkload(report=report):
                self.effects.report_workload(report)
            case ReportTenants(shares=shares):
                self.effects.report_tenants(shares)
            case AskForPlan(why=why, question=question):
                logger.info("re-planning: the workload has moved (%s); planning", why)
                self._ask_planner(question)
            case PlanDecided():
                logger.info("re-planning: %s", output.words)
            case Drained(instance=instance):
                logger.info("instance %s has drained", instance)
                self.watcher.instance_drained(instance)
            case StopInstance(instance=instance):
                self.stop_instance(instance)
                self.watcher.instance_leaving(instance)
            case InstanceLeft(instance=instance):
                self.watcher.instance_left(instance)

    def _ask_planner(self, question: PlanQuestion) -> None:
        if self.effects.ask_planner is None:
            self.feed(PlanningFailed(why="nobody plans here"))
        else:
            self.effects.ask_planner(question)

    def stop_instance(self, instance: InstanceId) -> None:
        """Ask an instance to end; one that reads no message is ended by whoever runs it."""
        try:
            self._socket.send(instance, encode(Stop()))
        except UnavailableError as error:
            logger.debug("no need to stop %s: %s", instance, error)

    def _send(self, output: AnySend) -> None:
        try:
            self._socket.send(output.instance, encode(self._message(output)))
        except UnavailableError as error:
            self._waiting.append((Unreachable(instance=output.instance, why=str(error)), {}))

    def _message(self, output: AnySend) -> Message:
        match output:
            case SendGenerate(request_id=request_id, hand_over=hand_over):
                return Generate(request=self._started(request_id, hand_over), hand_over=hand_over)
            case SendLend(request_id=request_id, epoch=epoch):
                return Lend(request_id=request_id, epoch=epoch, block_hashes=self._lendable(output))
            case SendWithPrefix() | SendOffer() | SendPartOffer():
                return self._with_offer(output)
            case SendAbort(request_id=request_id, epoch=epoch):
                return Abort(request_id=request_id, epoch=epoch)
            case SendRelease(request_id=request_id, epoch=epoch):
                return Release(request_id=request_id, epoch=epoch)
            case SendMigrate(request_id=request_id, epoch=epoch):
                self._sink.sequence_migrated()
                return Migrate(request_id=request_id, epoch=epoch)
            case TellPeerLost(lost=lost, incarnation=incarnation):
                return PeerLost(instance=lost, incarnation=incarnation)
            case AskForBlocks():
                return ReportBlocks()
            case AskToMeasure(source=source, incarnation=incarnation, pool=pool, access=access):
                return MeasureLink(source=source, incarnation=incarnation, pool=pool, access=access)
            case _:
                assert_never(output)

    def _lendable(self, output: SendLend) -> tuple[BlockHash, ...]:
        facts, request = self._core.members[output.instance].facts, self._records[output.request_id].request
        assert facts is not None, "an instance that holds something has said what it is"
        names = names_for(request.block_hashes, request.hash_block_size, facts.block_size)
        return lendable(names, request.num_tokens, facts.block_size)

    def _with_offer(self, output: SendWithPrefix | SendOffer | SendPartOffer) -> Message:
        """Return a message that says where KV blocks of the sequence are."""
        request_id = output.request_id
        match output:
            case SendWithPrefix(hand_over=hand_over, prefix=prefix):
                return Generate(request=self._started(request_id, hand_over), hand_over=hand_over, prefix=prefix)
            case SendOffer(offer=offer):
                return Adopt(request=self._records[request_id].request_now(), offer=offer)
            case SendPartOffer(offer=offer, is_first=True):
                return Reserve(request=self._records[request_id].request_now(), offer=offer)
            case SendPartOffer(offer=offer):
                return MoreKv(offer=offer)

    def _started(self, request_id: RequestId, hands_over: bool) -> GenerationRequest:
        record = self._records[request_id]
        record.start(hands_over=hands_over)
        return record.request_now()

    def _wake_at(self, time_s: float, now: float) -> None:
        if self._wake_up is not None:
            self._wake_up.cancel()
        self._wake_up = asyncio.get_running_loop().call_later(max(0.0, time_s - now), self.tick)


def _refusal(output: Refuse) -> DisaggError:
    if output.reason is RefuseReason.UNAVAILABLE:
        return UnavailableError(output.detail)
    return OverloadedError(output.detail, output.retry_after_s)
