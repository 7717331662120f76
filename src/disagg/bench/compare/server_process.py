"""A server as a process group of its own: started on chosen cores, awaited, and ended without a trace."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Final

import httpx
import psutil

from disagg.base.errors import DisaggError, UnavailableError

_PROBE_S: Final = 0.2
_PROBE_TIMEOUT_S: Final = 5.0
_END_S: Final = 20.0
"""Seconds that a server gets to end by itself."""
_KILL_S: Final = 10.0
_LOOK_S: Final = 0.05
_CPUCLOCK_SCHED: Final = 2
"""What Linux's clock_getcpuclockid joins to a process id."""
_TAIL_LINES: Final = 25
_START_DEADLINE_S: Final = 300.0
OUR_READY: Final = "/ready"
"""Path on which ``disagg serve`` says that it is ready."""


@dataclass(frozen=True, slots=True)
class ServerCommand:
    """How to start one server and know that it is ready."""

    name: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    url: str
    ready: str
    start_deadline_s: float
    cpus: tuple[int, ...] = ()
    """Cores for all its processes; empty pins nothing."""


@dataclass
class RunningServer:
    """A server that answers. ``start_s`` is how long it took to."""

    command: ServerCommand
    process: subprocess.Popen[bytes]
    start_s: float = 0.0
    _seen: set[psutil.Process] = field(default_factory=set)

    def processes(self) -> list[psutil.Process]:
        """Return its processes that live: all of its session, orphans too, and children that were seen to leave it."""
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.process.pid:
                    self._seen |= {process, *process.children(recursive=True)}
            except (psutil.NoSuchProcess, ProcessLookupError):
                continue
        self._seen = {process for process in self._seen if _is_alive(process)}
        return list(self._seen)

    def cpu_s(self) -> float:
        """Return the CPU time of all its processes so far, those included that have ended and were waited for."""
        total = 0.0
        for process in self.processes():
            try:
                times = process.cpu_times()
            except psutil.Error:
                continue
            total += times.user + times.system + times.children_user + times.children_system
        return total

    def own_cpu_s(self) -> float:
        """Return the CPU time of the first process alone, by its own clock: other counts are whole ticks."""
        return time.clock_gettime((~self.process.pid << 3) | _CPUCLOCK_SCHED)

    def memory_bytes(self) -> int:
        """Return its memory, shared pages counted once."""
        total = 0
        for process in self.processes():
            try:
                total += process.memory_full_info().pss
            except psutil.Error:
                continue
        return total


def free_port() -> int:
    """Return a port of the loopback address on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def our_arguments(arguments: Sequence[str], port: int) -> tuple[str, ...]:
    """Return what starts ``disagg serve`` of this installation."""
    return (sys.executable, "-m", "disagg.cli.main", "serve", *arguments, "--port", str(port))


def serve_command(name: str, arguments: Sequence[str]) -> ServerCommand:
    """Return how to start ``disagg serve`` with these arguments on a free port."""
    port = free_port()
    return ServerCommand(
        name=name,
        arguments=our_arguments(arguments, port),
        environment={},
        url=f"http://127.0.0.1:{port}",
        ready=OUR_READY,
        start_deadline_s=_START_DEADLINE_S,
    )


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the process as Ctrl-C does: with the servers that it runs.

    SIGINT too, which a shell lets its background jobs ignore: the others are passed on as it.
    """

    def interrupt(_: int, __: FrameType | None) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def running(command: ServerCommand, log: Path) -> Iterator[RunningServer]:
    """Start a server, wait until it is ready, and end all its processes afterwards, whatever happens.

    In the main thread that holds for the signals of ``terminable``, too. Its output goes to ``log``. Raises
    UnavailableError with the log's end when it cannot be started, ends, or is not ready in time; DisaggError when it
    cannot be ended.
    """
    takes_signals = threading.current_thread() is threading.main_thread()
    with terminable() if takes_signals else nullcontext():
        server = RunningServer(command, _start(command, log))
        try:
            _await_ready(server, log)
            yield server
        finally:
            _end(server)


def _start(command: ServerCommand, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        try:
            with _pinned(command.cpus):
                return subprocess.Popen(
                    command.arguments,
                    env={**os.environ, **command.environment},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            raise UnavailableError(
                f"cannot start {command.name}: {command.arguments[0]}: {error.strerror or error}"
            ) from error


def log_tail(log: Path, num_lines: int = _TAIL_LINES) -> str:
    """Return the last lines of a log."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-num_lines:]
    return "\n".join(lines) or "(its log is empty)"


def _await_ready(server: RunningServer, log: Path) -> None:
    command = server.command
    started_s = time.monotonic()
    while True:
        status = server.process.poll()
        server.start_s = time.monotonic() - started_s
        if status is not None:
            raise UnavailableError(
                f"{command.name} ended with status {status} after {server.start_s:.1f} s, before it was ready. "
                f"{_told(command, log)}"
            )
        if _is_ready(command):
            server.processes()
            return
        if server.start_s > command.start_deadline_s:
            raise UnavailableError(
                f"{command.name} did not answer {command.url}{command.ready} within {command.start_deadline_s:g} s: "
                f"raise start_deadline_s, or see why. {_told(command, log)}"
            )
        time.sleep(_PROBE_S)


def _told(command: ServerCommand, log: Path) -> str:
    return f"Started as: {' '.join(command.arguments)}\nThe end of its log:\n{log_tail(log)}"


def _is_ready(command: ServerCommand) -> bool:
    try:
        return httpx.get(command.url + command.ready, timeout=_PROBE_TIMEOUT_S).is_success
    except httpx.TransportError:
        return False


@contextmanager
def _pinned(cpus: Collection[int]) -> Iterator[None]:
    """Move this thread to ``cpus`` for a moment: a child process starts where its parent is, and stays."""
    if not cpus:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _end(server: RunningServer) -> None:
    """Ask the server to end; kill what is left of it after a while, or at once when interrupted again."""
    try:
        server.processes()
        if server.process.poll() is None:
            server.process.terminate()
        _wait(server, _END_S)
    finally:
        left = _wait(server, _KILL_S, kill=True)
    if left:
        pids = ", ".join(str(process.pid) for process in left)
        raise DisaggError(
            f"processes {pids} of {server.command.name} cannot be ended: the next system would share cores"
        )


def _wait(server: RunningServer, at_most_s: float, *, kill: bool = False) -> list[psutil.Process]:
    """Wait until no process of the server lives, killing them or not; return those that do after ``at_most_s``."""
    deadline_s = time.monotonic() + at_most_s
    while True:
        server.process.poll()
        alive = server.processes()
        if not alive or time.monotonic() > deadline_s:
            return alive
        for process in alive if kill else ():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(_LOOK_S)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
