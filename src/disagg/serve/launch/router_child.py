"""The keeper's side of one router's process: started, told of the fleet, listened to, retired, ended."""

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Callable
from typing import Final

from msgspec import structs

from disagg.base.errors import ProtocolError, UnavailableError
from disagg.base.ids import InstanceId, RouterId
from disagg.base.message_fields import PROTOCOL_VERSION, Message
from disagg.scheduling.router.elastic_view import ElasticView
from disagg.serve.launch.fleet_messages import (
    Retire,
    RouterServing,
    RouterTask,
    RouterUp,
    ToFleet,
    check_version,
    decode_for_fleet,
)
from disagg.serve.launch.message_pipe import MessagePipe
from disagg.serve.launch.process import ChildProcess, Exit, LineListener

ROUTER_COMMAND: Final = (sys.executable, "-m", "disagg.serve.launch.router_process")

logger = logging.getLogger(__name__)


class RouterChild:
    """One life of a router. ``hear`` is told what it says, but for how far its start has come."""

    def __init__(self, name: RouterId, slot: int, hear: "Callable[[RouterChild, ToFleet], None]") -> None:
        self.name = name
        self.slot = slot
        self.is_up = False
        """It knows the instances, and is told what becomes of them."""
        self.outside_port = 0
        """Where instances of other hosts connect to it, if any may."""
        self.is_serving = asyncio.Event()
        self.is_retiring = False
        self.shown = ElasticView()
        """What it was told last of how the fleet changes by itself."""
        self.last_seen_s = asyncio.get_running_loop().time()
        self._hear = hear
        self._process: ChildProcess | None = None
        self._pipe: MessagePipe | None = None
        self._fault = ""

    @property
    def label(self) -> InstanceId:
        """What it is called in logs."""
        return InstanceId(f"router-{self.slot}")

    @property
    def pid(self) -> int | None:
        """Process id, while it has one."""
        return None if self._process is None else self._process.pid

    async def live(self, task: RouterTask, listener: socket.socket, lines: LineListener) -> Exit:
        """Run its process to its end. ``task`` lacks the numbers of the descriptors."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._pipe = await MessagePipe.open(ours)
            told = structs.replace(task, listener=listener.fileno(), pipe=theirs.fileno())
            numbers = (told.listener, told.pipe)
            try:
                self._process = await ChildProcess.start(self.label, told, lines, ROUTER_COMMAND, descriptors=numbers)
            except OSError as error:
                return Exit(status=1, fault=f"its process could not be started: {error.strerror}")
        reading = asyncio.create_task(self._read(), name=f"messages of {self.label}")
        try:
            ended = await self._process.wait()
            return Exit(status=ended.status, last_lines=ended.last_lines, fault=self._fault)
        finally:
            self._process = None
            reading.cancel()
            self._pipe.close()

    def tell(self, message: Message) -> None:
        """Send a message; one that reads none is ended."""
        if self._pipe is None:
            return
        try:
            self._pipe.send(message)
        except UnavailableError as error:
            self.end(str(error))

    def retire(self, timeout_s: float, *, is_restart: bool) -> None:
        """Let it finish what is under way, and end."""
        self.is_retiring = True
        self.tell(Retire(timeout_s=timeout_s, is_restart=is_restart))

    def end(self, why: str = "") -> None:
        """Kill its process at once."""
        self._fault = self._fault or why
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)

    async def _read(self) -> None:
        assert self._pipe is not None, "it is read once it is open"
        try:
            while (data := await self._pipe.receive()) is not None:
                self._take(decode_for_fleet(data))
        except ProtocolError as error:
            self.end(str(error))

    def _take(self, message: ToFleet) -> None:
        self.last_seen_s = asyncio.get_running_loop().time()
        match message:
            case RouterUp():
                check_version(message, PROTOCOL_VERSION)
            case RouterServing():
                self.is_serving.set()
        self._hear(self, message)
