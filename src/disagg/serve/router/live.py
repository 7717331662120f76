"""The live router: the API submits sequences to it, instances and their launcher report to it.

Everything happens on one event loop, in the order in which it arrives; no method waits for an instance.
"""

import asyncio
import logging
from collections.abc import Mapping
from typing import Final, assert_never

from disagg.base.clock import Clock, MonotonicClock
from disagg.base.config import RouterSettings
from disagg.base.errors import InternalError, ProtocolError, UnavailableError
from disagg.base.ids import InstanceId, RequestId
from disagg.base.messages import (
    Failed,
    Loading,
    LoadReport,
    Offered,
    Pulled,
    Ready,
    StepOutput,
    Stop,
    decode_for_router,
    encode,
)
from disagg.base.request import GenerationRequest, Role
from disagg.scheduling.dispatch import Dispatcher
from disagg.scheduling.dispatch_events import (
    InstanceDown,
    InstanceUp,
    OfferMade,
    PullEnded,
    SequenceFailed,
)
from disagg.serve.router.control_socket import ControlSocket
from disagg.serve.router.event_log import DispatchLogWriter
from disagg.serve.router.instance_table import InstanceTable, InstanceWatcher, KnownInstance, NullWatcher
from disagg.serve.router.interface import InstanceStatus
from disagg.serve.router.shell import DispatchShell
from disagg.serve.router.sink import DropReason, NullSink, RouterSink
from disagg.serve.router.start_gate import StartGate
from disagg.serve.router.stream import LiveStream

logger = logging.getLogger(__name__)

MAX_MALFORMED_MESSAGES: Final = 3
"""An instance that sent this many in one life is ended: it is broken, or of another version."""

_FromReadyInstance = StepOutput | Offered | Pulled | Failed | LoadReport


class LiveRouter:
    """The Router that the API uses. ``start`` binds the socket; ``close`` ends what is left.

    An instance that is silent for too long or breaks the protocol is treated as dead at once: its sequences fail, the
    others are told, and the watcher is asked to end the process and start a new one. ``instance_starting`` and
    ``instance_exited`` are for whoever runs the processes.
    """

    def __init__(
        self,
        instances: Mapping[InstanceId, Role],
        settings: RouterSettings,
        socket: ControlSocket,
        *,
        sink: RouterSink | None = None,
        clock: Clock | None = None,
        event_log: DispatchLogWriter | None = None,
    ) -> None:
        self._settings = settings
        self._socket = socket
        self._watcher: InstanceWatcher = NullWatcher()
        self._sink = sink or NullSink()
        self._clock = clock or MonotonicClock()
        self._table = InstanceTable(instances, self._clock.now())
        self._shell = DispatchShell(
            Dispatcher(instances, settings),
            self._table,
            socket,
            self._declare_lost,
            clock=self._clock,
            sink=self._sink,
            event_log=event_log,
        )
        self._check_interval_s = min(1.0, settings.instance_timeout_s / 4, settings.start_timeout_s / 4)
        self._next_check: asyncio.TimerHandle | None = None
        self._start_gate = StartGate(settings.instance_wait_s, settings.max_queued_requests)
        self._stopping = False

    # For the API ----------------------------------------------------------------------------------------------

    def submit(self, request: GenerationRequest) -> LiveStream:
        """See Router."""
        if self._stopping:
            raise UnavailableError("the server is stopping")
        return self._shell.submit(request)

    async def wait_started(self) -> None:
        """See Router."""
        await self._start_gate.wait()

    def abort(self, request_id: RequestId) -> None:
        """See Router."""
        self._shell.cancel(request_id)

    def instances(self) -> tuple[InstanceStatus, ...]:
        """See Router."""
        return tuple(known.status() for known in self._table)

    def is_ready(self) -> bool:
        """See Router."""
        return self._table.has_path() and not self._stopping

    # For whoever runs the server ------------------------------------------------------------------------------

    def start(self, watcher: InstanceWatcher) -> None:
        """Listen for instances and tell ``watcher`` about them; raise ConfigurationError when that is impossible."""
        self._watcher = watcher
        self._socket.open(self._receive)
        self._schedule_check()

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new sequences and wait for those under way; return False when some had to be failed."""
        self._stopping = True
        self._start_gate.open()
        try:
            await asyncio.wait_for(self._shell.wait_until_idle(), timeout_s)
        except TimeoutError:
            self._shell.cancel_all(UnavailableError("the server is stopping"))
            return False
        return True

    def stop_instances(self) -> None:
        """Ask every instance to end."""
        self._stopping = True
        data = encode(Stop())
        for known in self._table:
            try:
                self._socket.send(known.instance, data)
            except UnavailableError as error:
                logger.debug("no need to stop %s: %s", known.instance, error)

    def close(self) -> None:
        """Fail what is under way, and stop to listen. May be called twice."""
        self._stopping = True
        self._start_gate.open()
        self._shell.cancel_all(UnavailableError("the server has stopped"))
        self._shell.close()
        if self._next_check is not None:
            self._next_check.cancel()
        self._socket.close()

    # For whoever runs the instances ---------------------------------------------------------------------------

    def instance_starting(self, instance: InstanceId) -> None:
        """A process of the instance is about to be started; it is given time to load."""
        self._table[instance].set_starting(self._clock.now())

    def instance_exited(self, instance: InstanceId, detail: str, *, returning: bool) -> None:
        """The instance's process is gone; ``returning`` when another one will be started."""
        known = self._table[instance]
        known.num_restarts += 1
        self._lose(known, detail, returning=returning)

    # Instances ------------------------------------------------------------------------------------------------

    def _declare_lost(self, instance: InstanceId, why: str) -> None:
        """Treat a faulty instance as dead, and have it ended."""
        known = self._table[instance]
        logger.error("instance %s is treated as dead: %s", instance, why)
        self._lose(known, why, returning=True)
        self._watcher.instance_faulty(instance, why)

    def _lose(self, known: KnownInstance, detail: str, *, returning: bool) -> None:
        if known.is_ready:
            self._sink.instance_lost(known.instance)
        known.set_lost(detail)
        self._shell.feed(InstanceDown(instance=known.instance, returning=returning, detail=detail))

    def _schedule_check(self) -> None:
        if self._next_check is not None:
            self._next_check.cancel()
        self._last_check_s = self._clock.now()
        loop = asyncio.get_running_loop()
        self._next_check = loop.call_later(self._check_interval_s, self.check_instances)

    def check_instances(self) -> None:
        """Treat silent instances as dead. A timer calls this; it is public for tests of time."""
        now = self._clock.now()
        pause_s = now - self._last_check_s - self._check_interval_s
        for known in self._table:
            known.last_seen_s += max(0.0, pause_s)  # when this process itself stood still, nobody else was silent
        silent = self._table.silent(now, self._settings.instance_timeout_s, self._settings.start_timeout_s)
        for known, why in silent:
            self._declare_lost(known.instance, why)
        self._schedule_check()

    # Messages -------------------------------------------------------------------------------------------------

    def _receive(self, instance: InstanceId, data: bytes) -> None:
        known = self._table.get(instance)
        if known is None:
            logger.warning("a message from %r, which is no instance of this server, was dropped", instance)
            return
        try:
            message = decode_for_router(data)
        except ProtocolError as error:
            self._note_malformed(known, str(error))
            return
        known.last_seen_s = self._clock.now()
        if isinstance(message, Loading):
            known.detail = message.stage
            self._watcher.instance_loading(instance, message.stage, message.fraction)
        elif isinstance(message, Ready):
            self._welcome(known, message)
        elif not known.is_ready:
            self._sink.message_dropped(instance, DropReason.STALE)
        else:
            try:
                self._take(known, message)
            except InternalError as error:
                self._declare_lost(instance, f"it broke the protocol: {error}")

    def _note_malformed(self, known: KnownInstance, error: str) -> None:
        known.num_malformed += 1
        self._sink.message_dropped(known.instance, DropReason.MALFORMED)
        logger.warning("message %d from %s dropped: %s", known.num_malformed, known.instance, error)
        if known.num_malformed == MAX_MALFORMED_MESSAGES:
            self._declare_lost(known.instance, f"{known.num_malformed} malformed messages, the last: {error}")

    def _welcome(self, known: KnownInstance, message: Ready) -> None:
        if why := known.why_unfit(message):
            self._declare_lost(known.instance, why)
            return
        if known.is_ready:
            if message.incarnation == known.incarnation:
                return
            self._lose(known, "it was started anew", returning=True)
        known.set_ready(message)
        facts = message.facts
        capacity = min(facts.max_model_len, facts.num_blocks * facts.block_size)
        self._shell.feed(InstanceUp(instance=known.instance, max_total_tokens=capacity))
        if self._table.has_path():
            self._start_gate.open()
        self._watcher.instance_ready(known.instance, facts)

    def _take(self, known: KnownInstance, message: _FromReadyInstance) -> None:
        """Handle what only a ready instance says; raise InternalError when it cannot be."""
        instance = known.instance
        match message:
            case StepOutput():
                self._shell.emit(instance, message.outputs)
            case Offered(offer=offer):
                if (offer.source, offer.incarnation) != (instance, known.incarnation):
                    raise InternalError(f"it offered blocks of {offer.source} {offer.incarnation}")
                self._shell.keep_offer(offer)
                self._shell.feed(OfferMade(request_id=offer.request_id, epoch=offer.epoch, instance=instance))
            case Pulled():
                self._sink.hand_over_ended(
                    message.source, instance, message.num_bytes, message.duration_s, message.failure
                )
                self._shell.feed(PullEnded(request_id=message.request_id, epoch=message.epoch, instance=instance))
            case Failed():
                self._shell.feed(
                    SequenceFailed(
                        request_id=message.request_id,
                        epoch=message.epoch,
                        instance=instance,
                        kind=message.kind,
                        detail=message.message,
                    )
                )
            case LoadReport():
                if message.incarnation == known.incarnation:
                    known.load = message.load
                else:
                    self._sink.message_dropped(instance, DropReason.STALE)
            case _:
                assert_never(message)
