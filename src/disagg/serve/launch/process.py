"""One engine instance, or one router, as a child process: started, listened to, ended."""

import asyncio
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

import msgspec

from disagg.base.ids import InstanceId

ENGINE_COMMAND: Final = (sys.executable, "-m", "disagg.engine")

_NUM_LINES_KEPT: Final = 20
_MERE_NEWS: Final = "INFO "
"""How a line of the log begins that says nothing of an end."""
_MAX_LINE_BYTES: Final = 8192
_READ_BYTES: Final = 65536
_LAST_WORDS_S: Final = 1.0
"""How long the error output may stay open after the process ended (something else may have inherited it)."""

_SPAWN_DESCRIPTORS: Final = 12
"""What starting a process opens for a moment, and more."""

LineListener = Callable[[InstanceId, str], None]
"""Takes one line of a child's error output."""


def _need_descriptors() -> None:
    """Raise OSError where there are too few: uvloop leaks some, and does not say why, when it fails half-way."""
    opened: list[int] = []
    try:
        while len(opened) < _SPAWN_DESCRIPTORS:
            opened.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    finally:
        for descriptor in opened:
            os.close(descriptor)


class Exit(msgspec.Struct, frozen=True, kw_only=True):
    """How a process ended. ``status`` is its exit status, or minus the signal that killed it."""

    status: int
    last_lines: tuple[str, ...] = ()
    fault: str = ""
    """Why it was ended or never began, when that was not its own doing."""

    def describe(self) -> str:
        """Say in words how and, as far as it is known, why it ended."""
        if self.fault:
            return self.fault
        if error := self.error():
            return f"{self.how()}: {error}"
        told = [line for line in self.last_lines if not line.startswith(_MERE_NEWS)]
        return f"{self.how()}; it last said: {told[-1]}" if told else self.how()

    def error(self) -> str:
        """Return what it gave as its error, or an empty string."""
        errors = [line.removeprefix("error: ") for line in self.last_lines if line.startswith("error: ")]
        return errors[-1] if errors else ""

    def how(self) -> str:
        """Say how it ended."""
        if self.status >= 0:
            return f"exit status {self.status}"
        name = signal.Signals(-self.status).name if -self.status in set(signal.Signals) else f"signal {-self.status}"
        hint = " (by hand, or because memory ran out)" if name == "SIGKILL" else ""
        return f"killed by {name}{hint}"


class ChildProcess:
    """A running process, by name. It leads a session of its own, so a Ctrl-C in the terminal does not reach it."""

    def __init__(self, name: InstanceId, process: asyncio.subprocess.Process, listener: LineListener) -> None:
        self.name = name
        self._process = process
        self._listener = listener
        self._last_lines: deque[str] = deque(maxlen=_NUM_LINES_KEPT)
        self._reader = asyncio.create_task(self._read_errors(), name=f"stderr of {name}")

    @classmethod
    async def start(
        cls,
        name: InstanceId,
        settings: msgspec.Struct,
        listener: LineListener,
        command: Sequence[str] = ENGINE_COMMAND,
        *,
        descriptors: Sequence[int] = (),
    ) -> "ChildProcess":
        """Start a process and hand it its settings on stdin, and ``descriptors`` under the numbers that they have here.

        Raises OSError when the system cannot start one.
        """
        _need_descriptors()
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
            pass_fds=tuple(descriptors),
        )
        started = cls(name, process, listener)
        assert process.stdin is not None
        with suppress(BrokenPipeError, ConnectionResetError):  # it died at once: ``wait`` says how
            process.stdin.write(msgspec.json.encode(settings))
            await process.stdin.drain()
        process.stdin.close()
        return started

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    async def wait(self) -> Exit:
        """Wait for the end and return how it came."""
        status = await self._process.wait()
        await asyncio.wait({self._reader}, timeout=_LAST_WORDS_S)
        self._reader.cancel()
        return Exit(status=status, last_lines=tuple(self._last_lines))

    @property
    def has_ended(self) -> bool:
        """True once it has ended, also before the event loop has heard of it."""
        try:
            return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return True

    def send_signal(self, number: signal.Signals) -> None:
        """Signal the process and all that it started; nothing happens when it is gone."""
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    async def _read_errors(self) -> None:
        stream = self._process.stderr
        assert stream is not None
        pending = b""
        while data := await stream.read(_READ_BYTES):
            *lines, pending = (pending + data).split(b"\n")
            if len(pending) > _MAX_LINE_BYTES:
                lines, pending = [*lines, pending], b""
            for line in lines:
                self._take_line(line)
        if pending:
            self._take_line(pending)

    def _take_line(self, line: bytes) -> None:
        text = line[:_MAX_LINE_BYTES].decode(errors="replace").rstrip()
        if text:
            self._last_lines.append(text)
            self._listener(self.name, text)
