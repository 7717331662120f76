"""Servers are awaited with a deadline and end without a trace, whatever they leave behind or refuse."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import pytest

from disagg.base.errors import UnavailableError
from disagg.bench.compare import server_process
from disagg.bench.compare.server_process import RunningServer, ServerCommand, free_port, log_tail, running

FAKE = Path(__file__).with_name("fake_openai_server.py")


def command(*flags: str, start_deadline_s: float = 30.0) -> ServerCommand:
    port = free_port()
    return ServerCommand(
        name="fake",
        arguments=(sys.executable, str(FAKE), "--port", str(port), *flags),
        environment={},
        url=f"http://127.0.0.1:{port}",
        ready="/v1/models",
        start_deadline_s=start_deadline_s,
    )


@contextmanager
def started(tmp_path: Path, *flags: str) -> Iterator[RunningServer]:
    with running(command(*flags), tmp_path / "log") as server:
        yield server


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def test_a_server_answers_within_the_block_and_is_gone_after_it(tmp_path: Path) -> None:
    with started(tmp_path) as server:
        assert httpx.get(f"{server.command.url}/v1/models").is_success
        assert server.start_s > 0
        assert server.cpu_s() > 0
        assert server.memory_bytes() > 1 << 20
        processes = server.processes()
    assert processes
    assert alive(processes) == []
    assert log_tail(tmp_path / "log") == "listening"


def test_children_that_outlive_the_server_are_ended_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_process, "_END_S", 0.2)
    with started(tmp_path, "--children") as server:
        processes = server.processes()
        assert len(processes) == 3
        assert len({os.getsid(process.pid) for process in processes}) == 2
    assert alive(processes) == []


def test_a_server_that_will_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_process, "_END_S", 0.2)
    with started(tmp_path, "--stubborn") as server:
        processes = server.processes()
    assert alive(processes) == []


def test_a_server_is_ended_when_the_block_fails(tmp_path: Path) -> None:
    processes: list[psutil.Process] = []

    def interrupt() -> None:
        with started(tmp_path) as server:
            processes.extend(server.processes())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert processes
    assert alive(processes) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_server_ends_with_a_program_that_is_ended_by_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    arguments = command().arguments
    program = (
        "import signal\n"
        "from pathlib import Path\n"
        "from disagg.bench.compare.server_process import ServerCommand, running\n"
        f"one = ServerCommand('fake', {arguments!r}, {{}}, 'http://127.0.0.1:{arguments[3]}', '/v1/models', 30.0)\n"
        f"with running(one, Path({str(tmp_path / 'log')!r})) as server:\n"
        "    print(server.process.pid, flush=True)\n"
        "    signal.pause()\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        server = psutil.Process(int(process.stdout.readline()))
        process.send_signal(number)
        process.communicate(timeout=60)
    assert alive([server]) == []


def test_a_server_that_ends_early_is_told_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"(?s)fake ended with status 3 .*no such model: gpt-5"):
        with running(command("--dead"), tmp_path / "log"):
            pytest.fail("it was never ready")


def test_a_server_that_is_never_ready_is_given_up_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_process, "_END_S", 0.2)
    never = command("--dumb", "--children", start_deadline_s=1.0)
    with pytest.raises(UnavailableError, match=r"(?s)did not answer http://127.*/v1/models within 1 s.*child (\d+)"):
        with running(never, tmp_path / "log"):
            pytest.fail("it was never ready")
    children = [int(line.split()[1]) for line in (tmp_path / "log").read_text().splitlines()]
    assert len(children) == 2
    assert not any(psutil.pid_exists(child) and psutil.Process(child).status() != "zombie" for child in children)


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="cannot start fake: /no/such/program: No such file"):
        with running(replace(command(), arguments=("/no/such/program",)), tmp_path / "log"):
            pytest.fail("it cannot have started")


def test_a_server_gets_the_cores_it_was_given_and_the_client_keeps_its_own(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    core = min(before)
    with running(replace(command(), cpus=(core,)), tmp_path / "log") as server:
        assert os.sched_getaffinity(server.process.pid) == {core}
        assert os.sched_getaffinity(0) == before


def test_a_log_shows_its_end(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("\n".join(str(n) for n in range(100)))
    assert log_tail(tmp_path / "log", 2) == "98\n99"
    (tmp_path / "log").write_text("")
    assert log_tail(tmp_path / "log") == "(its log is empty)"
