"""One child process: what it says and how it ends."""

import asyncio
import errno
import os
import resource
import signal
import sys
from contextlib import suppress

import pytest

from disagg.base.config import CacheSettings, InstanceSettings, ModelSettings, SchedulerSettings
from disagg.base.ids import InstanceId
from disagg.base.request import Role
from disagg.serve.launch.process import ChildProcess, Exit

SETTINGS = InstanceSettings(
    instance=InstanceId("prefill-0"),
    role=Role.PREFILL,
    control_endpoint="ipc://nowhere",
    model=ModelSettings(),
    cache=CacheSettings(),
    scheduler=SchedulerSettings(),
)


async def run(program: str) -> tuple[Exit, list[str]]:
    lines: list[str] = []
    process = await ChildProcess.start(
        SETTINGS.instance, SETTINGS, lambda _, line: lines.append(line), (sys.executable, "-c", program)
    )
    return await process.wait(), lines


async def test_it_gets_its_settings_on_stdin_and_its_words_are_heard():
    program = "import sys, json; print(json.load(sys.stdin)['instance'], file=sys.stderr)"
    ended, lines = await run(program)
    assert lines == ["prefill-0"]
    assert ended.status == 0


async def test_lines_come_whole_and_bounded():
    program = "import sys; sys.stderr.write('a\\n\\nb' + 'x' * 100_000 + '\\nlast, without an end')"
    _, lines = await run(program)
    assert lines[0] == "a"
    assert lines[-1] == "last, without an end"
    assert max(map(len, lines)) == 8192


async def test_its_error_is_found_among_its_last_lines():
    program = "import sys; sys.exit('error: no such model: x') if 1 else 0"
    ended, _ = await run(program)
    assert ended.describe() == "exit status 1: no such model: x"


async def test_a_signal_is_named():
    ended, _ = await run("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    assert ended.describe() == "killed by SIGSEGV"


async def test_a_process_that_does_not_read_its_settings_is_no_problem():
    ended, _ = await run("import os; os.close(0); os._exit(3)")
    assert ended.describe() == "exit status 3"


@pytest.mark.parametrize(
    ("ended", "words"),
    [
        (Exit(status=1, last_lines=("Traceback", "KeyError: 'x'")), "exit status 1; it last said: KeyError: 'x'"),
        (Exit(status=2, last_lines=("error: a", "bye")), "exit status 2: a"),
        (Exit(status=1, last_lines=("OSError: y", "INFO disagg: news")), "exit status 1; it last said: OSError: y"),
        (
            Exit(status=-9, last_lines=("INFO disagg: news",)),
            "killed by SIGKILL (by hand, or because memory ran out)",
        ),
        (Exit(status=-9), "killed by SIGKILL (by hand, or because memory ran out)"),
        (Exit(status=-9, fault="no sign of life for 30 s"), "no sign of life for 30 s"),
        (Exit(status=-64), f"killed by {signal.Signals(64).name}"),
    ],
)
def test_the_end_in_words(ended, words):
    assert ended.describe() == words


async def test_no_descriptor_is_lost_to_starts_that_fail_for_want_of_them():
    _, hard = limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = os.listdir("/proc/self/fd")
    resource.setrlimit(resource.RLIMIT_NOFILE, (_lowest_free() + 3, hard))
    try:
        for _ in range(10):
            with pytest.raises(OSError) as caught:
                await run("pass")
            assert caught.value.errno == errno.EMFILE
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(os.listdir("/proc/self/fd")) == len(before)


def _lowest_free() -> int:
    descriptor = os.open(os.devnull, os.O_RDONLY)
    os.close(descriptor)
    return descriptor


async def test_its_end_is_known_before_the_event_loop_hears_of_it():
    program = "import sys; sys.stdin.read(); sys.stderr.write('up\\n'); sys.stderr.flush(); import time; time.sleep(60)"
    up = asyncio.Event()
    process = await ChildProcess.start(
        SETTINGS.instance, SETTINGS, lambda _, line: up.set(), (sys.executable, "-c", program)
    )
    await asyncio.wait_for(up.wait(), 30)
    assert not process.has_ended
    os.kill(process.pid, signal.SIGKILL)
    with suppress(ChildProcessError):  # the event loop has taken its status already
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert process.has_ended
    assert (await process.wait()).status == -signal.SIGKILL
