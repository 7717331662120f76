"""An instance of another host joins a running server, over the loopback and between network namespaces."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from server_process import ServerProcess, completion, serving
from test_lifecycle import wait_for

EXACT = ("--dtype", "float32", "--max-model-len", "512", "--kv-memory", "256MiB", "--threads", "1")
PROMPT = "Once upon a time there was a house by the sea. " * 3
DEADLINE_S = 60.0


class Joiner:
    """A `disagg serve --join` in a process of its own."""

    def __init__(self, *arguments: str, prefix: Sequence[str] = ()) -> None:
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "disagg.cli.main", "serve", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(self.process.stderr)

    def engine(self) -> psutil.Process:
        (engine,) = [
            child
            for child in psutil.Process(self.process.pid).children(recursive=True)
            if "disagg.engine" in " ".join(child.cmdline())
        ]
        return engine

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(how)
        status = self.process.wait(DEADLINE_S)
        self._reader.join(DEADLINE_S)
        assert self.process.stderr is not None
        self.process.stderr.close()
        return status


@contextmanager
def joined(*arguments: str, prefix: Sequence[str] = ()) -> Iterator[Joiner]:
    joiner = Joiner(*arguments, prefix=prefix)
    try:
        yield joiner
    finally:
        joiner.end()


def door_of(server: ServerProcess) -> str:
    """Where instances of other hosts join."""
    found = re.search(r"other hosts join at tcp://(\S+)", server.text)
    assert found is not None, server.text
    return found[1]


def states(server: ServerProcess) -> dict[str, str]:
    return {one["instance"]: one["state"] for one in server.get("/status").json()["instances"]}


def tokens(server: ServerProcess, number: int = 0) -> list[int]:
    answer = completion(
        server, f"{number}: {PROMPT}", max_tokens=8, min_tokens=8, temperature=0.0, return_token_ids=True
    )
    return answer.choices[0].token_ids


def answers(server: ServerProcess, count: int) -> list[list[int]]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda number: tokens(server, number), range(count)))


def test_an_instance_joins_serves_dies_comes_back_and_leaves(tmp_path: Path) -> None:
    keys = ("--keys", str(tmp_path / "keys"))
    with serving(*EXACT, *keys, "--listen-instances", "127.0.0.1:0") as server:
        expected = answers(server, 3)
        common = ("--join", door_of(server), "--role", "decode", *keys)
        refused = Joiner(*common, "--dtype", "bfloat16")
        assert refused.end(signal.SIGCONT) == 2
        assert "another --dtype: the server has float32, this host bfloat16" in "".join(refused.lines)

        with joined(*common, *EXACT, "--kv-link", "tcp") as joiner:
            wait_for(lambda: states(server).get("decode-1") == "ready", "decode-1 takes requests")
            assert answers(server, 3) == expected
            assert server.metric("disagg:kv_link", target="decode-1", link="tcp") == 1
            assert server.metric("disagg:hand_over_failures_total") == 0

            os.kill(joiner.engine().pid, signal.SIGKILL)
            assert answers(server, 3) == expected
            wait_for(lambda: states(server).get("decode-1") == "ready", "decode-1 is back")
            assert answers(server, 3) == expected
            engine = joiner.engine()
            assert joiner.end() == 0
            assert not engine.is_running()
        wait_for(lambda: "decode-1" not in states(server), "decode-1 has left")
        assert answers(server, 3) == expected


@pytest.mark.slow
@pytest.mark.parametrize("routers", [(), ("--routers", "2")], ids=["one", "two"])
def test_requests_wait_for_the_only_decode_instance_when_it_falls_silent(
    tmp_path: Path, routers: tuple[str, ...]
) -> None:
    keys = ("--keys", str(tmp_path / "keys"))
    patience = ("--instance-timeout-s", "4", "--instance-wait-s", "120", *routers)
    listening = ("--prefill", "1", "--listen-instances", "127.0.0.1:0")
    with serving(*EXACT, *keys, *listening, *patience) as server, ThreadPoolExecutor(4) as pool:
        joining = ("--join", door_of(server), "--role", "decode", *keys, *EXACT, "--kv-link", "tcp")
        with joined(*joining) as joiner:
            expected = answers(server, 4)
            engine = joiner.engine()
            engine.suspend()
            waiting = [pool.submit(tokens, server, number) for number in range(4)]
            assert [one.result() for one in waiting] == expected, "a 503 would raise"
            assert not engine.is_running()
            assert states(server) == {"prefill-0": "ready", "decode-0": "ready"}


def test_a_host_without_the_servers_keys_is_told_so(tmp_path: Path) -> None:
    joiner = Joiner("--join", "127.0.0.1:1", "--role", "decode", "--keys", str(tmp_path / "none"))
    assert joiner.end(signal.SIGCONT) == 2
    assert "`disagg keys` makes them on the server's host" in "".join(joiner.lines)


@contextmanager
def two_namespaces() -> Iterator[tuple[tuple[Sequence[str], str], tuple[Sequence[str], str]]]:
    """Two hosts joined by a cable, each with how to run something there and its address; skip where not allowed."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need iproute2 and root")
    names = [f"disagg-{os.getpid()}-{side}" for side in "ab"]
    commands = [f"ip netns add {name}" for name in names]
    commands += [f"ip link add veth0 netns {names[0]} type veth peer name veth0 netns {names[1]}"]
    for index, name in enumerate(names, start=1):
        commands += [
            f"ip -n {name} addr add 10.93.0.{index}/24 dev veth0",
            f"ip -n {name} link set lo up",
            f"ip -n {name} link set veth0 up",
        ]
    try:
        for command in commands:
            done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"network namespaces are not allowed here: {command}: {done.stderr.strip()}")
        yield tuple((("ip", "netns", "exec", name), f"10.93.0.{index}") for index, name in enumerate(names, start=1))  # type: ignore[misc]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.mark.slow
def test_a_decode_instance_across_a_network(tmp_path: Path) -> None:
    """Prefill on one host, decode on another: control with CURVE, KV over TCP, and real addresses of two namespaces."""
    keys = ("--keys", str(tmp_path / "keys"))
    with two_namespaces() as ((here, server_address), (there, _)):
        arguments = (
            *EXACT,
            *keys,
            "--prefill",
            "1",
            "--listen-instances",
            f"{server_address}:7000",
            "--kv-link",
            "tcp",
        )
        with serving(*arguments, prefix=here) as server:
            common = ("--join", f"{server_address}:7000", "--role", "decode", *keys, *EXACT, "--kv-link", "tcp")
            with joined(*common, prefix=there):
                url = f"{server.url}/v1/completions"
                body = json.dumps({"prompt": PROMPT, "max_tokens": 4, "temperature": 0.0, "logprobs": 0})
                ask = ["curl", "-s", "--max-time", "60", "-H", "Content-Type: application/json", "-d", body, url]
                wait_for(lambda: "choices" in run(here, ask), "an answer of both hosts")
                metrics = run(here, ["curl", "-s", f"{server.url}/metrics"])
                assert re.search(r'disagg:kv_link\{link="tcp",.*source="prefill-0",target="decode-0"\} 1', metrics)


def run(prefix: Sequence[str], command: Sequence[str]) -> str:
    return subprocess.run([*prefix, *command], capture_output=True, text=True, check=False, timeout=DEADLINE_S).stdout
