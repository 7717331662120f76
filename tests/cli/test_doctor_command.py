"""``disagg doctor``: what it prints, what it writes, and its exit status."""

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from disagg.cli.main import main
from disagg.costs.measured_steps import StepSample
from disagg.costs.profile import ParallelSamples, Profile, load_profile, save_profile


def link(**fields: Any) -> dict[str, Any]:
    """One link, as ``/admin/links`` says it."""
    return {
        "source": "prefill-0",
        "target": "decode-0",
        "is_measured": True,
        "link": "tcp",
        "why": "the only way there is",
        "bytes_per_s": 2.0 * 2**30,
        "latency_s": 5e-5,
        "limit_bytes_per_s": 4.0 * 2**30,
        "limit": "a socket of this host",
        "warning": "",
        **fields,
    }


class LinkServer(http.server.ThreadingHTTPServer):
    """Lists its links as not measured once, then as they are."""

    def __init__(self, *links: dict[str, Any]) -> None:
        super().__init__(("127.0.0.1", 0), LinkHandler)
        self.links = links
        self.num_looks = 0


class LinkHandler(http.server.BaseHTTPRequestHandler):
    server: LinkServer

    def do_GET(self) -> None:
        self.server.num_looks += 1
        is_measured = self.server.num_looks > 1
        self.answer([{**one, "is_measured": is_measured} for one in self.server.links])

    def do_POST(self) -> None:
        self.answer([])

    def answer(self, links: list[dict[str, Any]]) -> None:
        data = json.dumps({"links": links}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def doctor() -> Iterator[Any]:
    servers: list[LinkServer] = []

    def run(*links: dict[str, Any], arguments: tuple[str, ...] = ()) -> Result:
        server = LinkServer(*links)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return CliRunner().invoke(main, ["doctor", "--url", f"http://127.0.0.1:{server.server_port}", *arguments])

    yield run
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_sound_link_is_told_beside_its_limit(doctor: Any) -> None:
    result = doctor(link())
    assert result.exit_code == 0, result.output
    assert "prefill-0 to decode-0: tcp (the only way there is), 2GiB/s, 50 us to the first byte" in result.output
    assert "50% of a socket of this host (4GiB/s)" in result.output


def test_a_warning_is_told_and_is_the_exit_status(doctor: Any) -> None:
    result = doctor(link(), link(target="decode-1", warning="it is far too slow"))
    assert result.exit_code == 1
    assert "warning: it is far too slow" in result.output


def test_json_has_a_line_for_each_link(doctor: Any) -> None:
    result = doctor(link(), link(target="decode-1"), arguments=("--json",))
    assert [json.loads(line)["target"] for line in result.output.splitlines()] == ["decode-0", "decode-1"]


def profile_with_link(path: Path, bytes_per_s: float, latency_s: float) -> Path:
    sample = StepSample(chunks=((10, 1),), time_s=1e-3)
    profile = Profile(
        model="m",
        device="cpu",
        dtype="float32",
        kv_bytes_per_token=1,
        steps=(ParallelSamples(tensor_parallel=1, samples=(sample,) * 16),),
        link_bytes_per_s=bytes_per_s,
        link_latency_s=latency_s,
    )
    save_profile(profile, path)
    return path


def test_the_slowest_link_goes_into_a_profile_for_the_planner(doctor: Any, tmp_path: Path) -> None:
    path = profile_with_link(tmp_path / "profile.json", 3e9, 1e-4)
    result = doctor(link(), link(bytes_per_s=1e9, latency_s=2e-3), arguments=("--update-profile", str(path)))
    assert result.exit_code == 0, result.output
    written = load_profile(path)
    assert (written.link_bytes_per_s, written.link_latency_s) == (1e9, 2e-3)


def test_what_a_pull_takes_beside_its_bytes_stays(doctor: Any, tmp_path: Path) -> None:
    """A read alone waits for less than a hand-over does."""
    path = profile_with_link(tmp_path / "profile.json", 3e9, 4e-4)
    doctor(link(bytes_per_s=1e9, latency_s=5e-5), arguments=("--update-profile", str(path)))
    assert load_profile(path).link_latency_s == 4e-4


def test_a_profile_keeps_the_link_that_was_fitted_to_checked_hand_overs(doctor: Any, tmp_path: Path) -> None:
    path = profile_with_link(tmp_path / "profile.json", 1e9, 4e-4)
    before = path.read_bytes()
    result = doctor(link(), arguments=("--update-profile", str(path)))
    assert result.exit_code == 0, result.output
    assert "stays as it is" in result.output
    assert path.read_bytes() == before
