"""``disagg serve --join``: one instance on this host for a server on another one.

The host asks the server first, starts an engine under the name that it is given, and watches both: an engine that dies
is started again as the server's own would be, a server that is silent means asking anew, where its name then leads. A
host that is told to stop lets its instance give away what it holds first.
"""

import asyncio
import logging
import math
import secrets
import signal
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, assert_never

import zmq
import zmq.asyncio
from msgspec import structs

import disagg
from disagg.base.clock import Clock, MonotonicClock
from disagg.base.config import InstanceSettings
from disagg.base.errors import ConfigurationError, ProtocolError, UnavailableError
from disagg.base.ids import InstanceId
from disagg.base.joining import (
    HOST_PREFIX,
    LOST_S,
    PING_S,
    Admitted,
    AskToJoin,
    AskToLeave,
    EndYourInstance,
    InstanceEnded,
    ModelIdentity,
    NotAdmitted,
    StillHere,
    ToHost,
    decode_for_host,
)
from disagg.base.message_fields import MAX_MESSAGE_BYTES, PROTOCOL_VERSION, Message
from disagg.base.messages import encode
from disagg.scheduling.router.restart import RestartPolicy, RestartSettings
from disagg.serve.launch.deployment import under_terms
from disagg.serve.launch.launcher import CONFIGURATION_STATUS, STOP_S
from disagg.serve.launch.process import ChildProcess, Exit, LineListener
from disagg.serve.launch.ready_file import ReadyFile
from disagg.serve.launch.server_address import ServerAddress, ServerName

logger = logging.getLogger(__name__)

ANSWER_S: Final = 20.0
"""What a server gets to answer a host that was never admitted."""
FIRST_ATTEMPT_S: Final = 2.0
"""What the first attempt to reach a server gets, and each further one twice as long as the one before."""
MAX_ATTEMPT_S: Final = 8.0
RETRY_S: Final = 1.0
"""Between two attempts, and after a server has ended the instance."""
LINGER_MS: Final = 500
"""For the last words to the server."""


@dataclass(frozen=True, slots=True)
class Introduction:
    """What the server is to call a host, in words, and its instance, where that name is free."""

    host: str
    instance: InstanceId | None = None


class JoinedHost:
    """One engine for another host's server. ``run`` it once."""

    def __init__(
        self,
        settings: InstanceSettings,
        server: ServerName,
        identity: ModelIdentity,
        listener: LineListener,
        ready: ReadyFile,
        *,
        introduction: Introduction,
        leave_s: float,
    ) -> None:
        """``settings`` say all but what the server does, to which ``introduction`` is made.

        When it is to stop, answers get ``leave_s`` to move.
        """
        self._settings = settings
        self._server = server
        self._identity = identity
        self._listener = listener
        self._ready = ready
        self._introduction = introduction
        self._leave_s = leave_s
        self._clock: Clock = MonotonicClock()
        self._restarts = RestartPolicy(RestartSettings())
        self._heard_s = 0.0

    async def run(self) -> None:
        """Serve until SIGINT, SIGTERM or SIGHUP, or until the instance is removed; a second signal ends at once.

        Raises ConfigurationError when the server refuses this host, UnavailableError when it cannot be reached at
        first, or when the engine keeps dying.
        """
        self._stopping, self._impatient = asyncio.Event(), asyncio.Event()
        with ExitStack() as stack:
            _handle_signals(self._on_signal, stack)
            give_up_s = self._clock.now() + ANSWER_S
            patience_s = FIRST_ATTEMPT_S
            while not self._stopping.is_set():
                with ExitStack() as connection:
                    try:
                        address = await self._server.look_up()
                        connection.enter_context(self._connected(address))
                        admitted = await self._ask(address, patience_s)
                    except UnavailableError as error:
                        if self._clock.now() >= give_up_s:
                            raise
                        logger.info("%s; trying again", error)
                        patience_s = min(MAX_ATTEMPT_S, 2 * patience_s)
                        delay_s = RETRY_S
                    else:
                        if admitted is None:
                            return
                        give_up_s, patience_s = math.inf, FIRST_ATTEMPT_S
                        delay_s = await self._live(self._settings_of(admitted, address))
                await self._pause(delay_s)

    def _on_signal(self) -> None:
        (self._impatient if self._stopping.is_set() else self._stopping).set()

    def _settings_of(self, admitted: Admitted, address: ServerAddress) -> InstanceSettings:
        self._introduction = replace(self._introduction, instance=admitted.instance)  # to be called so again
        log = self._settings.event_log
        return structs.replace(
            self._settings,
            event_log=None if log is None else str(Path(log).with_name(f"{admitted.instance}.jsonl")),
            instance=admitted.instance,
            control_endpoint=address.endpoint,
            kv_host=address.kv_host,
            scheduler=under_terms(self._settings.scheduler, admitted.terms),
            tells_tokens=admitted.terms.tells_tokens,
        )

    # The server -----------------------------------------------------------------------------------------------

    def _connected(self, address: ServerAddress) -> ExitStack:
        """Open a connection that is known to the server by a new name."""
        stack = ExitStack()
        context = zmq.asyncio.Context()
        self._socket = context.socket(zmq.DEALER)
        keys = self._settings.control_curve
        assert keys is not None, "hosts join with keys"
        for option, value in (
            (zmq.ROUTING_ID, f"{HOST_PREFIX}{secrets.token_hex(8)}".encode()),
            (zmq.CURVE_SERVERKEY, keys.server_public.encode()),
            (zmq.CURVE_PUBLICKEY, keys.public.encode()),
            (zmq.CURVE_SECRETKEY, keys.secret.encode()),
            (zmq.LINGER, LINGER_MS),
            (zmq.SNDHWM, 64),
            (zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES),
        ):
            self._socket.setsockopt(option, value)
        self._socket.connect(address.endpoint)
        stack.callback(context.term)
        stack.callback(self._socket.close)
        return stack

    async def _ask(self, address: ServerAddress, patience_s: float) -> Admitted | None:
        """Ask to join, and return the answer, or None when this host is stopped before.

        Raises UnavailableError without an answer in ``patience_s``, ConfigurationError on a refusal.
        """
        logger.info("asking %s to join as %s", self._server, self._settings.role.value)
        await self._send(
            AskToJoin(
                version=PROTOCOL_VERSION,
                release=disagg.__version__,
                role=self._settings.role,
                model=self._identity,
                host=self._introduction.host,
                name=self._introduction.instance,
            )
        )
        until_s = self._clock.now() + patience_s
        while (left_s := until_s - self._clock.now()) > 0 and not self._stopping.is_set():
            match await self._receive(min(left_s, 0.5)):
                case Admitted() as admitted:
                    return admitted
                case NotAdmitted(why=why):
                    raise ConfigurationError(f"{self._server} does not admit this host: {why}")
        await self._send(InstanceEnded(detail="its host waits no longer"))  # should the answer be on its way
        if self._stopping.is_set():
            return None
        raise UnavailableError(
            f"no answer from {self._server} in {patience_s:g} s: is a server there, with --listen-instances, and are "
            "the keys here (--keys) copies of its own?"
        )

    async def _send(self, message: Message) -> None:
        with suppress(zmq.Again):
            await self._socket.send(encode(message), zmq.NOBLOCK)

    async def _receive(self, timeout_s: float) -> ToHost | None:
        if not await self._socket.poll(timeout_s * 1000):
            return None
        data = await self._socket.recv()
        self._heard_s = self._clock.now()
        try:
            return decode_for_host(data)
        except ProtocolError as error:
            logger.warning("a message of the server was dropped: %s", error)
            return None

    # The engine -----------------------------------------------------------------------------------------------

    async def _live(self, settings: InstanceSettings) -> float:
        """Run one engine to its end, and return how long to wait before the next one."""
        logger.info("admitted as %s: starting its engine", settings.instance)
        started_s = self._clock.now()
        try:
            process = await ChildProcess.start(settings.instance, settings, self._listener)
        except OSError as error:
            raise UnavailableError(f"the engine could not be started: {error.strerror}") from error
        ending = asyncio.create_task(process.wait(), name=f"end of {settings.instance}")
        try:
            why = await self._watch(ending)
            if why:
                logger.warning("ending %s: %s", settings.instance, why)
        finally:
            self._ready.show(False)
            ended = await _end(process, ending)
        returns = False
        try:
            if self._stopping.is_set():
                return 0.0
            delay_s = self._delay_s(ended, why, self._clock.now() - started_s)
            returns = not why and ended.status != 0
            return delay_s
        finally:
            await self._send(InstanceEnded(detail=ended.describe(), returns=returns))

    async def _watch(self, ending: "asyncio.Task[Exit]") -> str:
        """Return when the engine has ended by itself, or else why it should end."""
        self._heard_s = self._clock.now()
        pinged_s, leave_by_s = 0.0, math.inf
        while True:
            now = self._clock.now()
            if self._stopping.is_set() and math.isinf(leave_by_s):
                leave_by_s = now + self._leave_s
                await self._send(AskToLeave())
            if now >= leave_by_s or self._impatient.is_set():
                return "this host was told to stop"
            if now - self._heard_s > LOST_S:
                return f"the server has been silent for {LOST_S:g} s"
            if now - pinged_s >= PING_S:
                pinged_s = now
                await self._send(StillHere())
            has_ended = ending.done()  # the server's last words may have come with its end
            match await self._receive(0.0 if has_ended else 0.25):
                case EndYourInstance(why=why, for_good=for_good):
                    if for_good:
                        self._stopping.set()
                    return why
                case None if has_ended:
                    return ""
                case StillHere(takes_requests=takes_requests):
                    self._ready.show(takes_requests)
                case None | Admitted() | NotAdmitted():
                    pass
                case other:
                    assert_never(other)

    def _delay_s(self, ended: Exit, why: str, lived_s: float) -> float:
        if ended.status == CONFIGURATION_STATUS:
            raise ConfigurationError(f"the engine could not start: {ended.error() or ended.describe()}")
        if why or ended.status == 0:  # the server's doing: it ends, or does not want the instance
            return RETRY_S
        logger.error("the engine died: %s", ended.describe())
        delay_s = self._restarts.delay_s(lived_s)
        if delay_s is None:
            raise UnavailableError(f"the engine died too often; last: {ended.describe()}")
        return delay_s

    async def _pause(self, delay_s: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), delay_s)


async def _end(process: ChildProcess, ending: "asyncio.Task[Exit]") -> Exit:
    """End an engine, kindly at first, and return how it ended."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if not ending.done():
            process.send_signal(number)
            await asyncio.wait({ending}, timeout=STOP_S)
    return await ending


def _handle_signals(take: Callable[[], None], stack: ExitStack) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, take)
        stack.callback(loop.remove_signal_handler, number)
