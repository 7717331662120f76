"""A profiled instance as a child process: scripts in, what they brought out."""

import os
import select
import subprocess
import sys
import tempfile
import time
from types import TracebackType
from typing import IO, Final, Self, TypeVar

import msgspec

from disagg.base.config import InstanceSettings
from disagg.base.errors import ConfigurationError, InternalError
from disagg.base.messages import InstanceFacts
from disagg.calibration.steps.script import InstanceReady, Report, RunScript, Script, ScriptResult, StopScript

R = TypeVar("R", InstanceReady, ScriptResult)

_COMMAND: Final = (sys.executable, "-m", "disagg.calibration.steps")
_CONFIGURATION_STATUS: Final = 2
_END_DEADLINE_S: Final = 20.0
_READ_BYTES: Final = 1 << 20


class ProfiledInstance:
    """One instance that plays scripts; a context manager that ends it.

    Every wait has the deadline ``timeout_s``. Raises ConfigurationError when the settings cannot be used.
    """

    def __init__(self, settings: InstanceSettings, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._reports = msgspec.json.Decoder(Report)
        self._pending = b""
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            _COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, start_new_session=True
        )
        self._write(msgspec.structs.replace(settings, parent_pid=os.getpid()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def wait_until_ready(self) -> InstanceFacts:
        """Wait until the model is loaded and the KV pool is there; return what start-up found out."""
        return self._read(InstanceReady).facts

    def run(self, script: Script) -> ScriptResult:
        """Play a script and return what it brought: nothing yet, if it is endless."""
        self._write(RunScript(script=script))
        return self._read(ScriptResult)

    def stop(self) -> None:
        """End an endless script."""
        self._write(StopScript())
        self._read(ScriptResult)

    def close(self) -> None:
        """End the process."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        try:
            self._process.wait(_END_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def _write(self, message: msgspec.Struct) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(msgspec.json.encode(message) + b"\n")
            self._process.stdin.flush()
        except OSError:
            self._raise_ended()

    def _read(self, kind: type[R]) -> R:
        report = self._reports.decode(self._read_line())
        if not isinstance(report, kind):
            raise InternalError(f"the profiled instance answered {type(report).__name__}, not {kind.__name__}")
        return report

    def _read_line(self) -> bytes:
        assert self._process.stdout is not None
        deadline_s = time.monotonic() + self._timeout_s
        while b"\n" not in self._pending:
            remaining_s = max(0.0, deadline_s - time.monotonic())
            if not select.select([self._process.stdout], [], [], remaining_s)[0]:
                raise InternalError(f"the profiled instance said nothing for {self._timeout_s:.0f} s")
            data = os.read(self._process.stdout.fileno(), _READ_BYTES)
            if not data:
                self._raise_ended()
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _raise_ended(self) -> None:
        status = self._process.wait(_END_DEADLINE_S)
        self._errors.seek(0)
        text = self._errors.read().decode(errors="replace").strip()
        last = text.splitlines()[-1] if text else "it said nothing"
        if status == _CONFIGURATION_STATUS:
            raise ConfigurationError(last.removeprefix("error: "))
        raise InternalError(f"the profiled instance ended with status {status}: {last}")
