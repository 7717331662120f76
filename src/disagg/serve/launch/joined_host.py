"""``disagg serve --join``: one instance on this host for a server on another one.

The host asks the server first, starts an engine under the name that it is given, and watches both: an engine that dies
is started again as the server's own would be, a server that is silent means asking anew.
"""

import asyncio
import logging
import secrets
import signal
import socket
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Final, assert_never

import zmq
import zmq.asyncio
from msgspec import structs

import disagg
from disagg.base.clock import Clock, MonotonicClock
from disagg.base.config import InstanceSettings
from disagg.base.errors import ConfigurationError, ProtocolError, UnavailableError
from disagg.base.joining import (
    HOST_PREFIX,
    LOST_S,
    PING_S,
    Admitted,
    AskToJoin,
    EndYourInstance,
    InstanceEnded,
    ModelIdentity,
    NotAdmitted,
    StillHere,
    ToHost,
    decode_for_host,
)
from disagg.base.messages import MAX_MESSAGE_BYTES, PROTOCOL_VERSION, Message, encode
from disagg.scheduling.router.restart import RestartPolicy, RestartSettings
from disagg.serve.launch.launcher import CONFIGURATION_STATUS, STOP_S
from disagg.serve.launch.process import Exit, InstanceProcess, LineListener

logger = logging.getLogger(__name__)

ANSWER_S: Final = 20.0
"""What a server gets to answer a host that was never admitted."""
MAX_RETRY_S: Final = 8.0
LINGER_MS: Final = 500
"""For the last words to the server."""


class JoinedHost:
    """One engine for another host's server. ``run`` it once."""

    def __init__(self, settings: InstanceSettings, identity: ModelIdentity, listener: LineListener) -> None:
        """``settings`` say all but the name of the instance."""
        self._settings = settings
        self._identity = identity
        self._listener = listener
        self._clock: Clock = MonotonicClock()
        self._restarts = RestartPolicy(RestartSettings())
        self._heard_s = 0.0

    async def run(self) -> None:
        """Serve until SIGINT, SIGTERM or SIGHUP.

        Raises ConfigurationError when the server refuses this host, UnavailableError when it cannot be reached at
        first, or when the engine keeps dying.
        """
        self._stopping = asyncio.Event()
        with ExitStack() as stack:
            _stop_on_signals(self._stopping.set, stack)
            was_admitted = False
            while not self._stopping.is_set():
                with self._connected():
                    admitted = await self._ask(patient=was_admitted)
                    if admitted is None:
                        continue
                    was_admitted = True
                    delay_s = await self._live(structs.replace(self._settings, instance=admitted.instance))
                await self._pause(delay_s)

    # The server -----------------------------------------------------------------------------------------------

    def _connected(self) -> ExitStack:
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
        self._socket.connect(self._settings.control_endpoint)
        stack.callback(context.term)
        stack.callback(self._socket.close)
        return stack

    async def _ask(self, *, patient: bool) -> Admitted | None:
        """Ask to join; return None when a ``patient`` host got no answer for now, or is stopped."""
        logger.info("asking %s to join as %s", self._settings.control_endpoint, self._settings.role.value)
        await self._send(
            AskToJoin(
                version=PROTOCOL_VERSION,
                release=disagg.__version__,
                role=self._settings.role,
                model=self._identity,
                host=f"{socket.gethostname()} ({self._settings.kv_host})",
            )
        )
        until_s = self._clock.now() + ANSWER_S
        while (left_s := until_s - self._clock.now()) > 0 and not self._stopping.is_set():
            match await self._receive(min(left_s, 0.5)):
                case Admitted() as admitted:
                    return admitted
                case NotAdmitted(why=why):
                    raise ConfigurationError(f"{self._settings.control_endpoint} does not admit this host: {why}")
        if not patient and not self._stopping.is_set():
            raise UnavailableError(
                f"no answer from {self._settings.control_endpoint} in {ANSWER_S:g} s: is a server there, with "
                "--listen-instances, and are the keys here (--keys) copies of its own?"
            )
        return None

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
            process = await InstanceProcess.start(settings, self._listener)
        except OSError as error:
            raise UnavailableError(f"the engine could not be started: {error.strerror}") from error
        ending = asyncio.create_task(process.wait(), name=f"end of {settings.instance}")
        try:
            why = await self._watch(ending)
            if why:
                logger.warning("ending %s: %s", settings.instance, why)
        finally:
            ended = await _end(process, ending)
        await self._send(InstanceEnded(detail=ended.describe()))
        if self._stopping.is_set():
            return 0.0
        return self._delay_s(ended, why, self._clock.now() - started_s)

    async def _watch(self, ending: "asyncio.Task[Exit]") -> str:
        """Return when the engine has ended by itself, or else why it should end."""
        self._heard_s = self._clock.now()
        pinged_s = 0.0
        while not ending.done():
            if self._stopping.is_set():
                return "this host was told to stop"
            now = self._clock.now()
            if now - self._heard_s > LOST_S:
                return f"the server has been silent for {LOST_S:g} s"
            if now - pinged_s >= PING_S:
                pinged_s = now
                await self._send(StillHere())
            match await self._receive(0.25):
                case EndYourInstance(why=why):
                    return why
                case None | StillHere() | Admitted() | NotAdmitted():
                    pass
                case other:
                    assert_never(other)
        return ""

    def _delay_s(self, ended: Exit, why: str, lived_s: float) -> float:
        if ended.status == CONFIGURATION_STATUS:
            raise ConfigurationError(f"the engine could not start: {ended.error() or ended.describe()}")
        if why or ended.status == 0:  # the server's doing: it ends, or does not want the instance
            return 1.0
        logger.error("the engine died: %s", ended.describe())
        delay_s = self._restarts.delay_s(lived_s)
        if delay_s is None:
            raise UnavailableError(f"the engine died too often; last: {ended.describe()}")
        return delay_s

    async def _pause(self, delay_s: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), min(delay_s, MAX_RETRY_S))


async def _end(process: InstanceProcess, ending: "asyncio.Task[Exit]") -> Exit:
    """End an engine, kindly at first, and return how it ended."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if not ending.done():
            process.send_signal(number)
            await asyncio.wait({ending}, timeout=STOP_S)
    return await ending


def _stop_on_signals(stop: Callable[[], None], stack: ExitStack) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop)
        stack.callback(loop.remove_signal_handler, number)
