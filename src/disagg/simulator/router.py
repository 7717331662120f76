"""The simulated shell of the dispatcher: the real decisions, delivered over a control plane with a constant delay."""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import assert_never

from disagg.base.config import RouterSettings
from disagg.base.ids import InstanceId, RequestId
from disagg.base.messages import FailureKind
from disagg.base.request import Role
from disagg.scheduling.dispatch.actions import (
    AnyDispatchAction,
    Deliver,
    Drop,
    Fail,
    Finish,
    Refuse,
    SendAbort,
    SendAdopt,
    SendGenerate,
    SendPeerLost,
    SendRelease,
)
from disagg.scheduling.dispatch.dispatcher import Dispatcher
from disagg.scheduling.dispatch.events import (
    AnyDispatchEvent,
    InstanceUp,
    OfferMade,
    Progress,
    PullEnded,
    SequenceArrived,
    SequenceFailed,
    TokensEmitted,
)
from disagg.scheduling.step.actions import OfferKv, Reject, ReleaseLease, WakeAt
from disagg.scheduling.step.events import Arrived, Cancelled, KvOffered, LeaseReleased, PeerLost, Tick
from disagg.simulator.event_log import DispatchRecorder
from disagg.simulator.event_queue import EventQueue
from disagg.simulator.instance import SimulatedInstance
from disagg.simulator.request import FIRST_EPOCH, Outcome, SimulatedRequest


class SimulatedRouter:
    """Drives one dispatcher in virtual time. It listens to all instances."""

    def __init__(
        self,
        settings: RouterSettings,
        queue: EventQueue,
        on_ended: Callable[[SimulatedRequest], None],
        *,
        message_s: float = 0.0,
        recorder: DispatchRecorder | None = None,
    ) -> None:
        self._settings = settings
        self._queue = queue
        self._on_ended = on_ended
        self._message_s = message_s
        self._recorder = recorder
        self._instances: Mapping[InstanceId, SimulatedInstance] = {}
        self._compared: list[SimulatedInstance] = []
        self._requests: dict[RequestId, SimulatedRequest] = {}
        self._events: deque[AnyDispatchEvent] = deque()
        self._is_handling = False

    def connect(self, instances: Sequence[SimulatedInstance]) -> None:
        """Let all instances come up."""
        self._instances = {instance.spec.name: instance for instance in instances}
        self._compared = [instance for instance in instances if instance.spec.role is not Role.PREFILL]
        roles = {name: instance.spec.role for name, instance in self._instances.items()}
        self._dispatcher = Dispatcher(roles, self._settings)
        for name, instance in self._instances.items():
            self._feed(InstanceUp(instance=name, max_total_tokens=instance.spec.capacity))

    @property
    def num_requests(self) -> int:
        """Requests under way."""
        return len(self._requests)

    def submit(self, request: SimulatedRequest) -> None:
        """Take a request that arrives now."""
        self._report_loads()
        self._requests[request.request_id] = request
        self._feed(
            SequenceArrived(
                request_id=request.request_id,
                epoch=FIRST_EPOCH,
                num_tokens=request.prompt_len,
                max_total_tokens=request.max_total_tokens,
                priority=request.priority,
            )
        )

    # What instances say -------------------------------------------------------------------------------------

    def on_tokens(self, instance: InstanceId, requests: Sequence[SimulatedRequest]) -> None:
        """See ``InstanceListener``."""
        self._receive(_tokens_emitted(instance, requests))

    def on_offer(self, instance: InstanceId, offer: OfferKv) -> None:
        """See ``InstanceListener``."""
        request = self._requests[offer.request_id]
        request.offer, request.source = offer, instance
        self._report_loads()
        self._receive(OfferMade(request_id=offer.request_id, epoch=offer.epoch, instance=instance))

    def on_pull_ended(self, instance: InstanceId, release: ReleaseLease) -> None:
        """See ``InstanceListener``."""
        self._receive(PullEnded(request_id=release.request_id, epoch=release.epoch, instance=instance))

    def on_reject(self, instance: InstanceId, reject: Reject) -> None:
        """See ``InstanceListener``."""
        self._receive(
            SequenceFailed(
                request_id=reject.request_id,
                epoch=reject.epoch,
                instance=instance,
                kind=FailureKind.TOO_LONG,
                detail=reject.detail,
            )
        )

    def _report_loads(self) -> None:
        """Tell the dispatcher how far the running answers are, before it compares instances.

        First and last tokens are reported at once; those between only change the load of an instance, so they are
        reported together when that load is about to be looked at: never, where there is no choice.
        """
        if len(self._compared) < 2:
            return
        for instance in self._compared:
            unreported = instance.unreported()
            if unreported:
                self._feed(_tokens_emitted(instance.spec.name, unreported))

    # Deciding and telling -----------------------------------------------------------------------------------

    def _receive(self, event: AnyDispatchEvent) -> None:
        if self._message_s:
            self._queue.push(self._queue.now() + self._message_s, partial(self._feed, event))
        else:
            self._feed(event)

    def _feed(self, event: AnyDispatchEvent) -> None:
        """Handle one event, and then those that its actions caused."""
        self._events.append(event)
        if self._is_handling:
            return
        self._is_handling = True
        while self._events:
            now = self._queue.now()
            current = self._events.popleft()
            actions = self._dispatcher.handle(current, now)
            if self._recorder is not None:
                self._recorder.record(now, current, actions)
            for action in actions:
                self._carry_out(action, now)
        self._is_handling = False

    def _carry_out(self, action: AnyDispatchAction, now: float) -> None:
        match action:
            case Deliver() | Drop():
                pass
            case Finish(request_id=request_id):
                self._end(request_id, Outcome.FINISHED, "", now)
            case Fail(request_id=request_id, detail=detail):
                self._end(request_id, Outcome.FAILED, detail, now)
            case Refuse(request_id=request_id, detail=detail):
                self._end(request_id, Outcome.REFUSED, detail, now)
            case WakeAt(time_s=time_s):
                self._queue.push(time_s, partial(self._feed, Tick()))
            case SendGenerate() | SendAdopt() | SendAbort() | SendRelease() | SendPeerLost():
                self._send(action)
            case _:
                assert_never(action)

    def _send(self, action: SendGenerate | SendAdopt | SendAbort | SendRelease | SendPeerLost) -> None:
        if self._message_s:
            self._queue.push(self._queue.now() + self._message_s, partial(self._deliver, action))
        else:
            self._deliver(action)

    def _deliver(self, action: SendGenerate | SendAdopt | SendAbort | SendRelease | SendPeerLost) -> None:
        instance = self._instances[action.instance]
        match action:
            case SendGenerate(request_id=request_id, hand_over=hand_over):
                request = self._requests[request_id]
                instance.take(request, _arrived(request, hand_over))
            case SendAdopt(request_id=request_id):
                request = self._requests[request_id]
                instance.take(request, _kv_offered(request))
            case SendAbort(request_id=request_id, epoch=epoch):
                instance.deliver(Cancelled(request_id=request_id, epoch=epoch))
            case SendRelease(request_id=request_id, epoch=epoch):
                instance.deliver(LeaseReleased(request_id=request_id, epoch=epoch))
            case SendPeerLost(lost=lost):
                instance.deliver(PeerLost(instance=lost))
            case _:
                assert_never(action)

    def _end(self, request_id: RequestId, outcome: Outcome, detail: str, now: float) -> None:
        request = self._requests.pop(request_id)
        request.outcome = outcome
        request.detail = detail
        request.timeline.finished_s = now
        self._on_ended(request)


def _tokens_emitted(instance: InstanceId, requests: Iterable[SimulatedRequest]) -> TokensEmitted:
    """Report all tokens of these requests that were not reported yet."""
    progress = []
    for request in requests:
        num_new = request.num_output_tokens - request.num_reported_tokens
        request.num_reported_tokens = request.num_output_tokens
        progress.append(Progress(request.request_id, FIRST_EPOCH, num_new, request.is_complete))
    return TokensEmitted(instance=instance, progress=tuple(progress))


def _arrived(request: SimulatedRequest, hand_over: bool) -> Arrived:
    return Arrived(
        request_id=request.request_id,
        epoch=FIRST_EPOCH,
        num_tokens=request.prompt_len,
        max_total_tokens=request.max_total_tokens,
        priority=request.priority,
        arrival_s=request.arrival_s,
        hand_over=hand_over,
        block_hashes=request.block_hashes,
    )


def _kv_offered(request: SimulatedRequest) -> KvOffered:
    offer = request.offer
    assert offer is not None, "a sequence is adopted after its offer"
    assert request.source is not None, "an offer has a source"
    return KvOffered(
        request_id=request.request_id,
        epoch=FIRST_EPOCH,
        num_tokens=request.prompt_len + request.num_output_tokens,
        max_total_tokens=request.max_total_tokens,
        source=request.source,
        source_blocks=offer.block_ids,
        num_kv_tokens=offer.num_tokens,
        expires_s=offer.expires_s,
        priority=request.priority,
        arrival_s=request.arrival_s,
        block_hashes=request.block_hashes,
    )
