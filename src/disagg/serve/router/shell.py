"""The dispatcher's shell: feeds it events under the real clock and carries its actions out over a real socket."""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final, assert_never

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
from disagg.base.ids import InstanceId, RequestId
from disagg.base.messages import (
    Abort,
    Adopt,
    Generate,
    KvOffer,
    Message,
    PeerLost,
    Release,
    SequenceOutput,
    encode,
)
from disagg.base.request import GenerationRequest
from disagg.measure.timeline import RequestTimeline
from disagg.scheduling.dispatch.actions import (
    Deliver,
    Drop,
    Fail,
    FailReason,
    Finish,
    Refuse,
    RefuseReason,
    SendAbort,
    SendAdopt,
    SendGenerate,
    SendPeerLost,
    SendRelease,
)
from disagg.scheduling.dispatch.dispatcher import Dispatcher
from disagg.scheduling.dispatch.events import (
    AnyDispatchEvent,
    Progress,
    SequenceArrived,
    SequenceCancelled,
    TokensEmitted,
)
from disagg.scheduling.step.actions import WakeAt
from disagg.scheduling.step.events import Tick
from disagg.serve.router.control_socket import ControlSocket
from disagg.serve.router.event_log import DispatchLogWriter
from disagg.serve.router.instance_table import InstanceTable
from disagg.serve.router.record import SequenceRecord
from disagg.serve.router.sink import DropReason, RouterSink
from disagg.serve.router.stream import LiveStream

_ERRORS: Final[dict[FailReason | RefuseReason, type[DisaggError]]] = {
    FailReason.INSTANCE_LOST: InstanceLostError,
    FailReason.UNAVAILABLE: UnavailableError,
    FailReason.TIMEOUT: RequestTimeoutError,
    FailReason.TOO_LONG: ContextLengthError,
    FailReason.INVALID: InvalidRequestError,
    FailReason.INTERNAL: InternalError,
    RefuseReason.OVERLOADED: OverloadedError,
    RefuseReason.UNAVAILABLE: UnavailableError,
}


class DispatchShell:
    """One dispatcher and the records of the sequences that it decides on. Nothing here waits.

    ``unreachable`` is called with an instance that a message could not be sent to and the reason; it answers by
    feeding InstanceDown, which is handled after the event at hand.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        table: InstanceTable,
        socket: ControlSocket,
        unreachable: Callable[[InstanceId, str], None],
        *,
        clock: Clock,
        sink: RouterSink,
        event_log: DispatchLogWriter | None,
    ) -> None:
        self._dispatcher = dispatcher
        self._table = table
        self._socket = socket
        self._unreachable = unreachable
        self._clock = clock
        self._sink = sink
        self._event_log = event_log
        self._records: dict[RequestId, SequenceRecord] = {}
        self._events: deque[tuple[AnyDispatchEvent, Mapping[RequestId, SequenceOutput]]] = deque()
        self._handling = False
        self._wake_up: asyncio.TimerHandle | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    def submit(self, request: GenerationRequest) -> LiveStream:
        """Take a sequence; raise OverloadedError or UnavailableError when the dispatcher refuses it."""
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
        """Take what a step of ``instance`` brought; raise InternalError on outputs that cannot be."""
        by_id = {output.request_id: output for output in outputs}
        if len(by_id) != len(outputs):
            raise InternalError("two outputs of one step are for the same sequence")
        progress = tuple(
            Progress(output.request_id, output.epoch, len(output.token_ids), output.finish_reason is not None)
            for output in outputs
        )
        self.feed(TokensEmitted(instance=instance, progress=progress), by_id)

    def keep_offer(self, offer: KvOffer) -> None:
        """Remember the first offer of a sequence, for the instance that will adopt it."""
        record = self._records.get(offer.request_id)
        if record is not None and record.request.epoch == offer.epoch and record.offer is None:
            record.offer = offer

    def feed(self, event: AnyDispatchEvent, outputs: Mapping[RequestId, SequenceOutput] | None = None) -> None:
        """Handle one event, and those that its actions cause; raise InternalError when it cannot be."""
        self._events.append((event, outputs or {}))
        if self._handling:
            return
        self._handling = True
        try:
            while self._events:
                self._handle(*self._events.popleft())
        finally:
            self._handling = False
        if not self._records:
            self._idle.set()

    def close(self) -> None:
        """Forget the wake-up. Call ``cancel_all`` before."""
        if self._wake_up is not None:
            self._wake_up.cancel()

    def _handle(self, event: AnyDispatchEvent, outputs: Mapping[RequestId, SequenceOutput]) -> None:
        now = self._clock.now()
        log = self._event_log
        for action in log.handle(self._dispatcher, event, now) if log else self._dispatcher.handle(event, now):
            match action:
                case Deliver():
                    assert isinstance(event, TokensEmitted), "only a step's outputs are delivered"
                    role = self._table[event.instance].role
                    for request_id in action.request_ids:
                        self._records[request_id].accept(outputs[request_id], event.instance, role, now)
                case Drop():
                    self._sink.message_dropped(action.instance, DropReason.STALE)
                case Finish():
                    self._records.pop(action.request_id).stream.end()
                case Fail():
                    self._records.pop(action.request_id).stream.end(_ERRORS[action.reason](action.detail))
                case Refuse():
                    self._records.pop(action.request_id).stream.refuse(_ERRORS[action.reason](action.detail))
                case WakeAt():
                    self._wake_at(action.time_s, now)
                case _:
                    self._send(action)

    def _send(self, action: SendGenerate | SendAdopt | SendAbort | SendRelease | SendPeerLost) -> None:
        try:
            self._socket.send(action.instance, encode(self._message(action)))
        except UnavailableError as error:
            self._unreachable(action.instance, str(error))

    def _message(self, action: SendGenerate | SendAdopt | SendAbort | SendRelease | SendPeerLost) -> Message:
        match action:
            case SendGenerate():
                request = self._records[action.request_id].request_now()
                return Generate(request=request, hand_over=action.hand_over)
            case SendAdopt():
                record = self._records[action.request_id]
                assert record.offer is not None, "a sequence is adopted after its offer"
                return Adopt(request=record.request_now(), offer=record.offer)
            case SendAbort():
                return Abort(request_id=action.request_id, epoch=action.epoch)
            case SendRelease():
                return Release(request_id=action.request_id, epoch=action.epoch)
            case SendPeerLost():
                return PeerLost(instance=action.lost, incarnation=self._table[action.lost].incarnation)
            case _:
                assert_never(action)

    def _wake_at(self, time_s: float, now: float) -> None:
        if self._wake_up is not None:
            self._wake_up.cancel()
        self._wake_up = asyncio.get_running_loop().call_later(max(0.0, time_s - now), self._tick)

    def _tick(self) -> None:
        self._wake_up = None
        self.feed(Tick())
