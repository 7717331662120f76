"""A full disk costs a log and a tier, and no request."""

import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from fault_campaign import SETTINGS
from server_process import completion, serving
from test_lifecycle import wait_for

LONG = "It was a house by the sea, and the wind came in from the west. " * 4


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"only root can make a small file system: {made.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def fill(path: Path) -> None:
    """Write until nothing more can be written."""
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(bytes(1 << 12)):
            pass


@pytest.mark.slow
def test_no_request_fails_when_the_disk_of_log_and_blocks_is_full(small_disk: Path) -> None:
    log, blocks = small_disk / "log", small_disk / "blocks"
    with serving(*SETTINGS, "--event-log", str(log), "--kv-disk", f"{blocks},1GiB") as server:
        first = completion(server, LONG, max_tokens=24, temperature=0.0).choices[0].text
        fill(small_disk / "fill")
        for number in range(2):
            answer = completion(server, f"Story {number}. " + LONG, max_tokens=24, temperature=0.0)
            assert answer.usage.completion_tokens == 24
        assert completion(server, LONG, max_tokens=24, temperature=0.0).choices[0].text == first
        wait_for(lambda: "ends here, serving goes on" in server.text, "the word of the event log")
        wait_for(lambda: "KV blocks cannot be written" in server.text, "the word of the tier")
        assert server.metric("disagg:kv_disk_blocks") == 0
        assert server.text.count(" died: ") == 0
    assert "Traceback" not in server.text, server.text
