"""Starting, dying and ending: whatever happens, words are clear and nothing is left behind."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import psutil
import pytest
from server_process import ServerProcess, completion, serving, shared_memory_names

SMALL = ("--max-model-len", "512", "--kv-memory", "128MiB")


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    """For tests that leave it as they found it."""
    with serving(*SMALL) as running:
        yield running


def wait_for(condition: object, what: str, deadline_s: float = 60.0) -> None:
    """Ask again until a condition holds; the deadline is only for hopeless cases."""
    import time

    end = time.monotonic() + deadline_s
    assert callable(condition)
    while not condition():
        assert time.monotonic() < end, f"waited {deadline_s} s in vain for {what}"
        time.sleep(0.05)


def run_serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "disagg.cli.main", "serve", *arguments], capture_output=True, text=True, timeout=60
    )


def test_a_wrong_path_is_named_without_a_traceback() -> None:
    ended = run_serve("/no/such/model", "--port", "0")
    assert ended.returncode == 2
    assert "/no/such/model" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_busy_port_is_said_before_any_model_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = run_serve("--port", str(port))
    assert ended.returncode == 2
    assert str(port) in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("how", "placement"), [(signal.SIGINT, ("--colocated", "1")), (signal.SIGTERM, ("--prefill", "1", "--decode", "1"))]
)
def test_a_signal_ends_every_process_and_leaves_no_shared_memory(
    how: signal.Signals, placement: tuple[str, ...]
) -> None:
    before = shared_memory_names()
    with serving(*SMALL, *placement) as server:
        processes = psutil.Process(server.process.pid).children(recursive=True)
        assert len(server.instances()) == len(placement) // 2
        completion(server, "Hello", max_tokens=3)
        assert server.end(how) == 0
        assert not [process for process in processes if process.is_running()]
    assert shared_memory_names() <= before


def test_killing_the_server_takes_all_its_processes_along() -> None:
    with serving(*SMALL) as server:
        processes = psutil.Process(server.process.pid).children(recursive=True)
        assert len(processes) > len(server.instances())
        server.process.kill()
        psutil.wait_procs(processes, timeout=20)
        assert not [process for process in processes if process.is_running()]


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_an_instance_that_is_killed_is_named_and_restarted_and_its_requests_go_on(
    server: ServerProcess, role: str
) -> None:
    with ThreadPoolExecutor(4) as pool:
        under_way = [pool.submit(completion, server, "Tell me", max_tokens=400, ignore_eos=True) for _ in range(4)]
        wait_for(lambda: server.metric("vllm:num_requests_running") > 0, "running requests")
        (victim,) = [status["pid"] for status in server.get("/status").json()["instances"] if status["role"] == role]
        os.kill(victim, signal.SIGKILL)
        for request in under_way:
            assert request.result(timeout=60).usage.completion_tokens == 400
        wait_for(lambda: f"{role}-0 died: killed by SIGKILL" in server.text, "its death to be told")
        wait_for(lambda: server.get("/ready").status_code == 200, "the restarted instance")
        assert completion(server, "Hello", max_tokens=3).usage.completion_tokens > 0
        assert_no_block_is_held(server)


def assert_no_block_is_held(server: ServerProcess) -> None:
    def held() -> float:
        return sum(
            server.metric("disagg:kv_blocks", state=state) for state in ("active", "leased", "filling", "quarantined")
        )

    wait_for(lambda: held() == 0, "all KV blocks to come back")


def test_a_client_that_leaves_gives_its_blocks_back(server: ServerProcess) -> None:
    stream = completion(server, "Tell me", max_tokens=400, ignore_eos=True, stream=True)
    next(iter(stream))
    stream.close()
    wait_for(lambda: server.metric("vllm:num_requests_running") == 0, "the abort")
    assert_no_block_is_held(server)


def test_a_prompt_that_is_too_long_says_limit_and_length(server: ServerProcess) -> None:
    with pytest.raises(openai.BadRequestError, match="512") as caught:
        completion(server, list(range(1000, 1600)), max_tokens=3)
    assert "600" in str(caught.value)
