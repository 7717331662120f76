"""A real `disagg serve` in a real process, for tests: started on a free port, ended without a trace."""

import json
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil

START_DEADLINE_S = 120.0
END_DEADLINE_S = 30.0


class ServerProcess:
    """One running server; its log is kept for failure messages."""

    def __init__(self, *arguments: str, max_files: int | None = None, prefix: Sequence[str] = ()) -> None:
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "disagg.cli.main", "serve", "--port", "0", "--json", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=None
            if max_files is None
            else lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (max_files,) * 2),
        )
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        self.url = self._wait_until_ready()
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120.0)

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)

    def _wait_until_ready(self) -> str:
        watchdog = threading.Timer(START_DEADLINE_S, self.process.kill)
        watchdog.start()
        assert self.process.stdout is not None
        try:
            for line in self.process.stdout:
                message = json.loads(line)
                if "url" in message:
                    return str(message["url"])
        finally:
            watchdog.cancel()
        self.process.wait()
        self._reader.join(END_DEADLINE_S)
        raise AssertionError(f"the server ended with {self.process.returncode} before it was ready:\n{self.text}")

    @property
    def text(self) -> str:
        """The log so far."""
        return "".join(self.log)

    @cached_property
    def model(self) -> str:
        """The name of the model."""
        return str(self.client.models.list().data[0].id)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=30.0)

    def metric(self, name: str, **labels: str) -> float:
        """Sum a metric over all label sets that contain ``labels``."""
        from prometheus_client.parser import text_string_to_metric_families

        return sum(
            sample.value
            for family in text_string_to_metric_families(self.get("/metrics").text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def instances(self) -> list[psutil.Process]:
        """The engine processes."""
        return [
            child
            for child in psutil.Process(self.process.pid).children(recursive=True)
            if "disagg.engine" in " ".join(child.cmdline())
        ]

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal, wait, and return the exit status."""
        self.process.send_signal(how)
        return self.process.wait(END_DEADLINE_S)


@contextmanager
def serving(*arguments: str, max_files: int | None = None, prefix: Sequence[str] = ()) -> Iterator[ServerProcess]:
    """Run a server for the length of a block, with at most so many open files, perhaps behind a command."""
    server = ServerProcess(*arguments, max_files=max_files, prefix=prefix)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.end()
        server.client.close()
        for stream in (server.process.stdout, server.process.stderr):
            assert stream is not None
            server._reader.join(END_DEADLINE_S)
            stream.close()


def shared_memory_names() -> set[str]:
    """Names in /dev/shm, but for those of process pools, which tests have that run meanwhile."""
    return {path.name for path in Path("/dev/shm").iterdir() if not path.name.startswith("sem.mp-")}


def completion(server: ServerProcess, prompt: list[int] | str, **fields: Any) -> Any:
    """One completion through the official client; unknown fields go in the body."""
    known = {"max_tokens", "temperature", "seed", "n", "stop", "logprobs", "echo", "stream", "top_p"}
    extra = {name: value for name, value in fields.items() if name not in known}
    chosen = {name: value for name, value in fields.items() if name in known}
    return server.client.completions.create(model=server.model, prompt=prompt, extra_body=extra, **chosen)
