"""Runs the instances as child processes of this one: starts them, says when one dies, starts it again, ends them."""

import asyncio
import errno
import logging
import signal
from collections.abc import Sequence
from typing import Final, Protocol

from msgspec import structs

from disagg.base.config import InstanceSettings
from disagg.base.errors import ConfigurationError, DisaggError, InternalError, UnavailableError
from disagg.base.ids import InstanceId
from disagg.base.messages import InstanceFacts
from disagg.serve.launch.process import ENGINE_COMMAND, ChildProcess, Exit
from disagg.serve.launch.server_observer import ServerObserver

logger = logging.getLogger(__name__)

STOP_S: Final = 3.0
"""What an instance gets to end after a Stop message, before it is sent SIGTERM."""
TERMINATE_S: Final = 2.0
"""What it gets after SIGTERM, before it is killed."""
FIRST_RETRY_S: Final = 0.5
MAX_RETRY_S: Final = 8.0
"""How long to wait for what a new process needs and the system lacks; twice as long each time, up to this."""
CONFIGURATION_STATUS: Final = 2
"""Exit status of an instance whose settings cannot be used; another try would end the same."""
_LACKING: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM})
"""The system has no descriptors, processes or memory to spare now: nothing that an instance did."""


class ProcessListener(Protocol):
    """The router's side: it is told what becomes of the processes, and answers as an ``InstanceWatcher`` is told."""

    def instance_starting(self, instance: InstanceId) -> None:
        """A process of the instance is about to be started."""

    def instance_exited(self, instance: InstanceId, detail: str) -> None:
        """The instance's process is gone. Whether it is started again, the watcher is told before this returns."""


class _Child:
    """One instance over all its lives."""

    def __init__(self, settings: InstanceSettings, *, is_essential: bool = True) -> None:
        self.settings = settings
        self.is_essential = is_essential
        """False where the server goes on without it, should it not start."""
        self.stopping = asyncio.Event()
        self.supervisor: asyncio.Task[None] | None = None
        self.has_left = False
        self.process: ChildProcess | None = None
        self.is_ready = False
        self.was_ready = False
        self.restart_delay_s: float | None = None
        """When to start it again, as the router said at its last death."""
        self.given_up = False
        self.fault = ""
        """Why the router had it ended."""
        self.last_end = ""

    def send_signal(self, number: signal.Signals) -> None:
        """Signal its process, where it has one."""
        if self.process is not None:
            self.process.send_signal(number)


class Launcher:
    """Keeps one process running for each instance. It is the router's InstanceWatcher.

    ``start`` starts all, ``add`` one more; ``wait_ready`` returns when all take requests. ``failed`` is done when the
    server cannot go on: an instance did not start at all (its own error), or too many were given up to serve anything.
    """

    def __init__(
        self,
        instances: Sequence[InstanceSettings],
        listener: ProcessListener,
        observer: ServerObserver,
        *,
        command: Sequence[str] = ENGINE_COMMAND,
    ) -> None:
        self._children = {settings.instance: _Child(settings) for settings in instances}
        self._listener = listener
        self._observer = observer
        self._command = command
        self._is_stopping = False
        self._all_ready = asyncio.Event()
        self._endings: set[asyncio.Task[None]] = set()
        """Instances that leave, and are given time to end."""
        self.failed: asyncio.Future[DisaggError] = asyncio.get_running_loop().create_future()

    @property
    def pids(self) -> dict[InstanceId, int]:
        """Process ids of the instances that have a process."""
        return {name: child.process.pid for name, child in self._children.items() if child.process is not None}

    @property
    def settings(self) -> tuple[InstanceSettings, ...]:
        """What each instance was told at its start."""
        return tuple(child.settings for child in self._children.values())

    def start(self) -> None:
        """Start all instances, and go on to watch them."""
        for child in self._children.values():
            self._watch(child)
        if not self._children:
            self._all_ready.set()  # they all join from other hosts

    def add(self, settings: InstanceSettings) -> None:
        """Start one more instance, whose end ends nothing else."""
        child = self._children[settings.instance] = _Child(settings, is_essential=False)
        self._watch(child)

    async def wait_ready(self) -> None:
        """Return once every instance has been ready."""
        await self._all_ready.wait()

    async def stop(self) -> None:
        """End all instances: wait for those that were asked to stop, then terminate, then kill. May be called twice."""
        self._is_stopping = True
        await self._end(tuple(self._children.values()))

    def kill(self) -> None:
        """Kill all instances at once; ``stop`` then waits for their end."""
        self._is_stopping = True
        for child in self._children.values():
            child.stopping.set()
            child.send_signal(signal.SIGKILL)

    async def _end(self, children: Sequence[_Child]) -> None:
        for child in children:
            child.stopping.set()
            if not child.is_ready:
                child.send_signal(signal.SIGTERM)  # it still loads, and reads no message
        for number, patience_s in ((None, STOP_S), (signal.SIGTERM, TERMINATE_S), (signal.SIGKILL, None)):
            supervisors = [child.supervisor for child in children if child.supervisor is not None]
            if number is not None:
                for child in children:
                    child.send_signal(number)
            if not supervisors or not (await asyncio.wait(supervisors, timeout=patience_s))[1]:
                return

    # InstanceWatcher ------------------------------------------------------------------------------------------

    def instance_loading(self, instance: InstanceId, stage: str, fraction: float) -> None:
        """See InstanceWatcher."""
        self._observer.instance_loading(instance, stage, fraction)

    def instance_ready(self, instance: InstanceId, facts: InstanceFacts) -> None:
        """See InstanceWatcher."""
        child = self._children[instance]
        child.is_ready = child.was_ready = True
        self._observer.instance_ready(instance, facts)
        if all(other.was_ready for other in self._children.values()):
            self._all_ready.set()

    def instance_faulty(self, instance: InstanceId, why: str) -> None:
        """See InstanceWatcher."""
        child = self._children[instance]
        if child.process is not None and not child.process.has_ended:  # else its own end says more
            child.fault = why
            child.process.send_signal(signal.SIGKILL)

    def restart_instance(self, instance: InstanceId, delay_s: float) -> None:
        """See InstanceWatcher."""
        self._children[instance].restart_delay_s = delay_s

    def give_up_instance(self, instance: InstanceId, nothing_left: bool) -> None:
        """See InstanceWatcher."""
        child = self._children[instance]
        child.given_up = True
        child.restart_delay_s = None
        if child.was_ready and nothing_left:
            lost = ", ".join(name for name, other in self._children.items() if other.given_up)
            self._fail(
                UnavailableError(f"{lost} died too often, and nothing can be served without; last: {child.last_end}")
            )

    def instance_drained(self, instance: InstanceId) -> None:
        """See InstanceWatcher: nobody waits for it."""

    def instance_leaving(self, instance: InstanceId) -> None:
        """See InstanceWatcher."""
        ending = asyncio.create_task(self._end((self._children[instance],)), name=f"end of {instance}")
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)

    def instance_left(self, instance: InstanceId) -> None:
        """See InstanceWatcher."""
        child = self._children.pop(instance, None)
        if child is not None:  # it was none of another host
            child.has_left = True
            self._observer.instance_left(instance)

    # Lives and deaths -----------------------------------------------------------------------------------------

    def _watch(self, child: _Child) -> None:
        name = f"supervisor of {child.settings.instance}"
        child.supervisor = asyncio.create_task(self._supervise(child), name=name)
        child.supervisor.add_done_callback(self._note_end)

    async def _supervise(self, child: _Child) -> None:
        name = child.settings.instance
        while not child.stopping.is_set():
            child.fault = ""
            child.is_ready = False
            ended = await self._live(child)
            if self._is_stopping:
                return
            delay_s = self._after_death(child, ended)
            if delay_s is None:
                return
            await _pause(child, delay_s)
            logger.debug("starting %s again", name)
        if not self._is_stopping:
            self._listener.instance_exited(name, child.last_end)  # it was to leave between two lives

    async def _live(self, child: _Child) -> Exit:
        """Run one process of the instance to its end."""
        try:
            child.process = await self._start_process(child)
        except OSError as error:
            return Exit(status=1, fault=f"its process could not be started: {error.strerror}")
        if child.stopping.is_set():
            child.process.send_signal(signal.SIGKILL)
        ended = await child.process.wait()
        child.process = None
        return structs.replace(ended, fault=child.fault)

    async def _start_process(self, child: _Child) -> ChildProcess:
        """Start a process, if need be once the system has what it needs. Raises OSError when that is not the reason."""
        name, delay_s = child.settings.instance, FIRST_RETRY_S
        while True:
            self._listener.instance_starting(name)  # before its first message can come
            try:
                return await ChildProcess.start(name, child.settings, self._observer.instance_line, self._command)
            except OSError as error:
                if error.errno not in _LACKING or child.stopping.is_set():
                    raise
                logger.warning("%s cannot be started now (%s): trying again in %g s", name, error.strerror, delay_s)
            await _pause(child, delay_s)
            delay_s = min(MAX_RETRY_S, 2 * delay_s)

    def _after_death(self, child: _Child, ended: Exit) -> float | None:
        """Tell everybody and return the seconds until the next start, or None when there is none."""
        name, child.last_end = child.settings.instance, ended.describe()
        self._listener.instance_exited(name, child.last_end)
        if child.has_left:
            return None
        if child.was_ready or not child.is_essential:
            self._observer.instance_lost(name, child.last_end, child.restart_delay_s)
        elif ended.status == CONFIGURATION_STATUS:
            self._fail(ConfigurationError(f"{name} could not start: {ended.error() or child.last_end}"))
        else:
            self._fail(UnavailableError(f"{name} could not start: {child.last_end}"))
        return child.restart_delay_s

    def _note_end(self, supervisor: asyncio.Task[None]) -> None:
        if not supervisor.cancelled() and (error := supervisor.exception()) is not None:
            logger.error("the %s failed", supervisor.get_name(), exc_info=error)
            self._fail(InternalError(f"the {supervisor.get_name()} failed: {error}"))

    def _fail(self, error: DisaggError) -> None:
        if not self.failed.done():
            self.failed.set_result(error)


async def _pause(child: _Child, delay_s: float) -> None:
    """Wait so long, or until the instance is to end."""
    try:
        await asyncio.wait_for(child.stopping.wait(), delay_s)
    except TimeoutError:
        return
