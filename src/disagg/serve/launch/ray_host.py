"""What runs on a Ray node: an actor that starts one guest there, and tells its lines and its end."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import ray

GUEST_COMMAND: Final = (sys.executable, "-m", "disagg.serve.launch.guest")
_MAX_LINE_BYTES: Final = 8192


@dataclass(frozen=True)
class HostStarted:
    """The guest's process runs."""

    node: str
    pid: int
    devices: str
    """What Ray gave it of the node's GPUs."""


@dataclass(frozen=True)
class HostLine:
    """A line of the guest's error output."""

    text: str


@dataclass(frozen=True)
class HostEnded:
    """The guest's process has ended, with this status, or minus the signal that killed it."""

    status: int


HostNews = HostStarted | HostLine | HostEnded


class RayHost:
    """Made into an actor by ``RayManager``. The guest ends with it: their pipe closes, whoever is killed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, order: bytes) -> Iterator[HostNews]:
        """Start the guest with an encoded ``GuestOrder``, and yield what becomes of it."""
        process = self._process = subprocess.Popen(
            GUEST_COMMAND, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write(order + b"\n")
        process.stdin.flush()  # and left open
        node = f"{socket.gethostname()} (node {ray.get_runtime_context().get_node_id()})"
        yield HostStarted(node, process.pid, os.environ.get("CUDA_VISIBLE_DEVICES", ""))
        while line := process.stderr.readline(_MAX_LINE_BYTES):
            yield HostLine(line.decode(errors="replace").rstrip())
        yield HostEnded(process.wait())

    def stop(self) -> None:
        """Ask the guest to drain and end."""
        if self._process is not None:
            self._process.terminate()
