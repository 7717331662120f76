"""The whole command in a process of its own, with servers of a few lines: its figures, its files and its end."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

FAKE = Path(__file__).parents[1] / "bench" / "compare" / "fake_openai_server.py"
LOOK_S = 0.05
DEADLINE_S = 60.0

pytestmark = pytest.mark.usefixtures("default_model")


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "spec.yaml"
    script = shutil.copy(FAKE, tmp_path)  # so that its processes can be told from those of other tests
    server = f"{sys.executable} {script} --port {{port}}"
    path.write_text(
        f"""
title: Two fakes
cool_down_s: 0
settle_s: 0
repeats: 1
systems:
  - {{name: quick, command: "{server}"}}
  - {{name: slow, command: "{server} --first-s 0.05 --gap-s 0.01"}}
cases:
  - {{kind: closed_loop, prompt_len: 20, output_len: 4, users: [2], requests: 4, slo: ["ttft=1s,tpot=1s"]}}
""",
        encoding="utf-8",
    )
    return path


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "disagg.cli.main", "bench", "compare", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def servers(folder: Path) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        try:
            if str(folder / FAKE.name) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                yield process
        except psutil.NoSuchProcess:
            continue


def test_figures_and_ratios_as_json_and_files(spec: Path, tmp_path: Path) -> None:
    page, folder = tmp_path / "page.html", tmp_path / "kept"
    process = start(spec, "--json", "-o", page, "--save", folder)
    output, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, errors
    (comparison,) = json.loads(output)
    assert comparison["systems"] == ["quick", "slow"]
    assert comparison["load"] == "2 users"
    ttft = comparison["values"][0]
    assert ttft[0]["ratio"] is None
    assert ttft[1]["ratio"]["mean"] > 1
    assert "Two fakes" in page.read_text()
    assert {path.name for path in folder.iterdir()} == {
        *("results.json", "results-000.jsonl", "results-001.jsonl", "quick-0.log", "slow-0.log")
    }


def test_a_table_for_people(spec: Path) -> None:
    process = start(spec)
    output, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, errors
    assert "Two fakes" in output
    assert "TTFT P50" in output
    assert "×" in output


@pytest.fixture(params=["foreground", "background"])
def job(request: pytest.FixtureRequest) -> Iterator[None]:
    """How a shell starts the command: jobs in the background ignore SIGINT from the start."""
    if request.param == "foreground":
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("job")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_comparison_leaves_no_server_and_tells_what_it_has(
    spec: Path, tmp_path: Path, how: signal.Signals
) -> None:
    spec.write_text(spec.read_text().replace("--first-s 0.05", "--first-s 30"))
    folder = tmp_path / "kept"
    process = start(spec, "--save", folder)
    deadline_s = time.monotonic() + DEADLINE_S
    log = folder / "slow-0.log"
    while not (log.exists() and "listening" in log.read_text()) and time.monotonic() < deadline_s:
        assert process.poll() is None
        time.sleep(LOOK_S)
    process.send_signal(how)
    output, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130, errors
    assert "interrupted" in errors
    assert "quick" in output
    assert list(servers(tmp_path)) == []


def test_a_server_that_does_not_start_is_told_after_what_was_measured(spec: Path, tmp_path: Path) -> None:
    spec.write_text(spec.read_text().replace("--first-s 0.05", "--dead"))
    process = start(spec)
    output, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    assert "slow ended with status 3" in errors
    assert "no such model: gpt-5" in errors
    assert "TTFT P50" in output


def test_a_mistake_in_the_file_is_told_before_anything_starts(spec: Path) -> None:
    spec.write_text(spec.read_text().replace("users: [2]", "user: [2]"))
    process = start(spec)
    _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 2
    assert "unknown field `user` - at `$.cases[0]`" in errors
