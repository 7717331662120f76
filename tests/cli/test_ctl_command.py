"""``disagg ctl``: a command, the wait for its end, and the words for what went wrong."""

import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner, Result

from disagg.cli.main import main


def view(**fields: Any) -> dict[str, Any]:
    """One instance, as ``/admin/instances`` says it."""
    return {
        "instance": "decode-0",
        "role": "decode",
        "state": "ready",
        "detail": "",
        "pid": 7,
        "device": "cpu",
        "kernel_backend": "native",
        "num_running": 0,
        "num_waiting": 0,
        "num_leases": 0,
        "num_restarts": 0,
        "num_prefill_tokens_total": 0,
        "num_decode_tokens_total": 0,
        "kv_usage": 0.25,
        "kv_bytes": 1,
        "block_size": 32,
        "blocks": {},
        **fields,
    }


class Server(http.server.ThreadingHTTPServer):
    """Plays what a test wrote: answers to commands, and what the instances are at each look, the last one for good."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.looks: list[list[dict[str, Any]]] = [[view()]]
        self.refusal: tuple[int, str] | None = None
        self.commands: list[tuple[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        looks = self.server.looks
        self.answer(200, {"instances": looks.pop(0) if len(looks) > 1 else looks[0]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.commands.append((self.path, body))
        if self.server.refusal is not None:
            status, message = self.server.refusal
            self.answer(status, {"error": {"message": message}})
        else:
            self.answer(202, {"instance": "decode-0", "message": "it begins"})

    def answer(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def ctl(server: Server, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["ctl", "--url", server.url, *arguments])


def test_status_is_a_table(server: Server) -> None:
    shown = ctl(server, "status")
    assert shown.exit_code == 0
    assert shown.output.splitlines() == [
        "instance  role    state  pid  sequences  KV use",
        "decode-0  decode  ready  7    0          25%",
    ]


@pytest.mark.parametrize(
    ("arguments", "command", "looks", "words"),
    [
        (
            ("drain", "decode-0"),
            ("/admin/instances/decode-0/drain", {"undo": False, "force": False}),
            [[view(state="draining", num_sequences=2)], [view(state="draining")]],
            "decode-0 has drained after",
        ),
        (
            ("drain", "decode-0", "--undo"),
            ("/admin/instances/decode-0/drain", {"undo": True, "force": False}),
            [[view()]],
            "decode-0 takes requests after",
        ),
        (
            ("remove", "decode-0", "--force"),
            ("/admin/instances/decode-0/remove", {"force": True}),
            [[view(is_leaving=True)], []],
            "decode-0 has left after",
        ),
        (
            ("add", "--role", "decode"),
            ("/admin/instances", {"role": "decode"}),
            [[view(state="starting")], [view()]],
            "decode-0 takes requests after",
        ),
        (
            ("flip", "decode-0", "--role", "prefill"),
            ("/admin/instances/decode-0/flip", {"role": "prefill", "force": False}),
            [[view(role="prefill")]],
            "decode-0 is a prefill instance after",
        ),
    ],
)
def test_a_command_is_given_and_its_end_waited_for(
    server: Server, arguments: tuple[str, ...], command: object, looks: list[Any], words: str
) -> None:
    server.looks = looks
    given = ctl(server, *arguments)
    assert given.exit_code == 0, given.output
    assert server.commands == [command]
    assert given.output.splitlines()[0] == "it begins"
    assert words in given.output


def test_nobody_waits_who_does_not_want_to(server: Server) -> None:
    server.looks = [[view(state="draining", num_sequences=2)]]
    assert ctl(server, "--no-wait", "drain", "decode-0").output == "it begins\n"


def test_what_does_not_end_in_time_is_said(server: Server) -> None:
    server.looks = [[view(state="draining", num_sequences=2)]]
    given = ctl(server, "--timeout", "100ms", "drain", "decode-0")
    assert given.exit_code == 1
    assert "did not get there in 0.1 s (--timeout); it goes on" in given.output


def test_an_instance_that_does_not_start_is_said(server: Server) -> None:
    server.looks = [[view(state="gone", detail="exit status 2: no memory")]]
    given = ctl(server, "add", "--role", "decode")
    assert given.exit_code == 1
    assert "decode-0 did not start: exit status 2: no memory" in given.output


@pytest.mark.parametrize(("status", "exit_code"), [(409, 2), (401, 1)])
def test_a_refusal_is_passed_on(server: Server, status: int, exit_code: int) -> None:
    server.refusal = (status, "it is the last one")
    given = ctl(server, "drain", "decode-0")
    assert given.exit_code == exit_code
    assert "it is the last one" in given.output


def test_where_nobody_serves_that_is_said() -> None:
    given = CliRunner().invoke(main, ["ctl", "--url", "http://127.0.0.1:9", "status"])
    assert given.exit_code == 1
    assert "start a server with: disagg serve" in given.output
