"""``disagg top``: the figures out of what a server says, the frame out of the figures, and the command."""

import http.server
import json
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from msgspec import structs
from rich.console import Console

from disagg.base.errors import DisaggError, ProtocolError, UnavailableError
from disagg.cli import top as command
from disagg.cli.main import main
from disagg.cli.top_figures import Figures, History, keeps, make_figures
from disagg.cli.top_view import BLOCK_LOOKS, NUM_FIXED_LINES, STAGE_LOOKS, render, room_for, sparkline, stacked_bar
from disagg.measure.slo import Slo, parse_slo
from disagg.measure.timeline import Stage
from disagg.serve.api.instance_metrics import BLOCK_STATES
from disagg.serve.api.views import HandOverTotals, InstanceView, RequestPage, RequestView, ServerView

NOW_S = 1_000_000.0
SLO = parse_slo("ttft=250ms,tpot=100ms")


def instance(role: str = "decode", **fields: Any) -> InstanceView:
    given = InstanceView(
        instance=f"{role}-0",
        role=role,
        state="ready",
        detail="",
        pid=1,
        device="cpu",
        kernel_backend="native",
        num_running=2,
        num_waiting=1,
        num_leases=0,
        num_restarts=0,
        num_prefill_tokens_total=0,
        num_decode_tokens_total=0,
        kv_usage=0.25,
        kv_bytes=1 << 20,
        block_size=32,
        blocks={"free": 60, "active": 20, "leased": 5, "filling": 0, "cached": 15, "quarantined": 0},
    )
    return structs.replace(given, **fields)


def status(at_s: float = NOW_S, instances: Sequence[InstanceView] = (), **fields: Any) -> ServerView:
    shown = list(instances) or [instance("prefill"), instance("decode")]
    given = ServerView(
        model="tiny", version="1.2.3", ready=True, detail="", max_model_len=256, instances=shown, now_unix_s=at_s
    )
    return structs.replace(given, **fields)


def request(
    ended_s: float = NOW_S, ttft_s: float | None = 0.2, tpot_s: float | None = 0.05, **fields: Any
) -> RequestView:
    given = RequestView(
        request_id="0123456789abcdef",
        arrival_unix_s=ended_s - 1.0,
        num_prompt_tokens=100,
        num_output_tokens=10,
        finish_reason="stop",
        prefill_instance="prefill-0",
        decode_instance="decode-0",
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        e2e_s=1.0,
        stages={"prefill": 0.5, "decode": 0.5},
        stamps={"finished": 1.0},
    )
    return structs.replace(given, **fields)


def figures(
    statuses: Sequence[ServerView] = (), requests: Sequence[RequestView] = (), slo: Slo = SLO, num_shown: int = 10
) -> Figures:
    history = History(window_s=60.0)
    for one in statuses or [status()]:
        history.take(one, requests if one is (statuses or [one])[-1] else ())
    return make_figures(history, slo, num_shown)


def frame(shown: Figures, width: int = 130, trouble: str = "", num_instances: int | None = None) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(render(shown, "http://here:1", width, trouble, num_instances))
    return captured.get()


# Figures --------------------------------------------------------------------------------------------------------


def test_rates_are_growth_over_the_servers_own_time():
    shown = figures(
        [
            status(
                NOW_S + second,
                [
                    instance("prefill", num_prefill_tokens_total=100 * second),
                    instance("decode", num_decode_tokens_total=10 * second),
                ],
                hand_overs=HandOverTotals(num_total=second, bytes_total=1000 * second, seconds_total=0.01 * second),
                num_under_way=second,
            )
            for second in (0, 1, 3)
        ]
    )
    assert (shown.prefill_token_rate, shown.decode_token_rate) == (100.0, 10.0)
    assert shown.instance_token_rates == {"prefill-0": 100.0, "decode-0": 10.0}
    assert (shown.hand_over_rate, shown.hand_over_byte_rate) == (1.0, 1000.0)
    assert shown.hand_over_s == pytest.approx(0.01)
    assert shown.course_of_tokens == [10.0, 10.0]
    assert shown.course_under_way == [0.0, 1.0, 3.0]


def test_a_restarted_instance_counts_from_zero_again():
    before, after = instance(num_decode_tokens_total=5000), instance(num_decode_tokens_total=30)
    assert figures([status(NOW_S, [before]), status(NOW_S + 1, [after])]).decode_token_rate == 30.0


def test_the_first_answer_has_no_rates():
    shown = figures([status()])
    assert (shown.decode_token_rate, shown.hand_over_rate, shown.hand_over_s) == (0.0, 0.0, None)


def test_only_requests_of_the_window_count():
    shown = figures(requests=[request(NOW_S - 61, ttft_s=9.0), request(NOW_S - 30), request(NOW_S - 1)])
    assert shown.ttft.percentiles.p99 == pytest.approx(0.2)
    assert (shown.attainment.count, shown.attainment.total) == (2, 2)
    assert shown.request_rate == 1 / 5


def test_the_newest_request_is_shown_first():
    requests = [request(sequence=number) for number in range(5)]
    assert [one.sequence for one in figures(requests=requests, num_shown=3).requests] == [4, 3, 2]
    assert figures(requests=requests, num_shown=0).requests == []


@pytest.mark.parametrize(
    ("one", "kept"),
    [
        (request(), True),
        (request(ttft_s=0.3), False),
        (request(tpot_s=0.2), False),
        (request(tpot_s=None), True),
        (request(finish_reason="error", e2e_s=None, tpot_s=None), False),
        (request(finish_reason="abort", e2e_s=None), False),
        (request(ttft_s=None, tpot_s=None, finish_reason="error"), False),
    ],
)
def test_a_request_keeps_the_objectives_when_it_ended_well_and_in_time(one: RequestView, kept: bool):
    assert keeps(one, SLO) is kept


def test_old_answers_are_forgotten():
    history = History(window_s=10.0)
    for second in range(100):
        history.take(status(NOW_S + second), ())
    assert len(history.statuses) == 11


# The frame ------------------------------------------------------------------------------------------------------


def test_the_frame_says_how_everything_is():
    hand_overs = HandOverTotals(num_total=2, num_failures_total=1, bytes_total=2048, seconds_total=0.01)
    shown = figures(
        [status(NOW_S - 1), status(num_under_way=7, hand_overs=hand_overs)], [request(), request(ttft_s=0.5)]
    )
    text = frame(shown)
    for words in (
        "● ready  tiny · version 1.2.3 · http://here:1",
        "7 under way (4 in a batch)",
        "2 queued at instances",
        "2.00 hand-overs/s, 2KiB/s, 5.00 ms each, 1 failed",
        "prefill-0 → decode-0",
        "1 of 2    50 %",
        "250 ms",
    ):
        assert words in text, text
    (kept,) = [line for line in text.splitlines() if line.rstrip().endswith("✓")]
    assert "200 ms  50.0 ms" in kept


def test_without_objectives_nothing_is_judged():
    text = frame(figures(requests=[request()], slo=Slo()))
    assert "--slo sets them" in text
    assert "%" not in text.split("last 60 s")[1].split("request ")[0]


def test_instances_that_are_down_are_told_apart_and_why():
    lost = instance("decode", state="lost", detail="killed by SIGKILL", num_restarts=2)
    text = frame(figures([status(instances=[instance("prefill"), lost])]))
    assert "◐ ready, 1 of 2 instances are not" in text
    assert "▲ lost (killed by SIGKILL), died 2 times" in text
    unready = status(instances=[lost], ready=False, detail="no decode instance is ready")
    assert "no request can be served now: no decode instance is ready" in frame(figures([unready]))


def test_a_request_that_did_not_end_well_says_how():
    text = frame(figures(requests=[request(finish_reason="error", e2e_s=None, tpot_s=None)]))
    assert "✗ error" in text


@pytest.mark.parametrize("width", [80, 100, 116, 200])
def test_a_frame_fits_its_width_and_its_height(width: int):
    many = [request(num_prompt_tokens=12345, num_output_tokens=1234) for _ in range(6)]
    text = frame(figures(requests=many), width, trouble="no answer")
    lines = text.splitlines()
    assert "…" not in text
    assert max(map(len, lines)) <= width
    assert len(lines) <= NUM_FIXED_LINES + 2 + 6


def busy(num_instances: int, num_requests: int) -> Figures:
    """All that makes a frame wide and long: large numbers, instances that are down, requests that failed."""
    counts = {"num_running": 64, "num_waiting": 1024, "num_leases": 128, "num_restarts": 3}
    instances = [instance(instance=f"decode-{number}", **counts) for number in range(num_instances - 1)]
    lost = instance("prefill", state="starting", detail="loading weights: 45 %, after " + "a long story " * 9)
    failed = request(num_prompt_tokens=123456, num_output_tokens=12345, finish_reason="error", e2e_s=None, tpot_s=None)
    hand_overs = HandOverTotals(num_total=99999, num_failures_total=999, bytes_total=1 << 42, seconds_total=10.0)
    server = {"model": "a-model-with-a-name-that-is-long-8x7B-instruct", "num_under_way": 1024}
    views = [
        status(NOW_S - 1, [*instances, lost], **server),
        status(NOW_S, [*instances, lost], hand_overs=hand_overs, **server),
    ]
    return figures(views, [failed, request()] * num_requests, num_shown=num_requests)


@pytest.mark.parametrize("height", [24, 30, 50])
@pytest.mark.parametrize("num_instances", [2, 4, 8, 40])
def test_a_terminal_of_80_columns_shows_all_that_matters(num_instances: int, height: int) -> None:
    instances = busy(num_instances, 0).status.instances
    num_requests, num_shown = room_for(height, instances)
    shown = busy(num_instances, num_requests)
    text = frame(shown, 80, num_instances=num_shown)
    lines = [line.rstrip() for line in text.splitlines()]
    assert max(map(len, lines)) <= 80
    assert len(lines) + 1 <= height  # and one for trouble
    assert "◐ ready, 1 of" in lines[0]
    for words in ("1024 under way", "requests/s", "999 failed", "TTFT", "TPOT", "within", "250 ms", "both", "50 %"):
        assert words in text or (not num_requests and words == "50 %"), words
    assert any(line.startswith(("instance", "prefill-0")) and "held" in line for line in lines)
    (row,) = [line for line in lines if line.startswith("prefill-0") and line.endswith("25 %")]
    assert "▲ starting" in row
    cut = [line for line in lines if "…" in line]
    assert [line[:42] for line in cut] == ["prefill-0 ▲ starting (loading weights: 45 %"[:42]]
    assert (f"and {num_instances - num_shown} more" in text) is (num_shown < num_instances)


def test_a_terminal_of_80_columns_shows_requests_too() -> None:
    num_requests, _ = room_for(24, busy(2, 0).status.instances)
    assert num_requests >= 1
    assert "✗ error" in frame(busy(2, 2), 80)


def test_bars_are_exact_as_a_whole_and_differ_without_colour():
    looks = STAGE_LOOKS
    parts = {Stage.PREFILL.value: 0.34, Stage.DECODE.value: 0.33, Stage.DELIVERY.value: 0.33}
    assert stacked_bar(parts, looks, 1.0, 10).plain == "███▒▒▒▒▪▪▪"
    assert len(stacked_bar(parts, looks, 2.0, 10).plain) == 5
    assert stacked_bar({}, looks, 0.0, 10).plain == ""
    for table in (STAGE_LOOKS, BLOCK_LOOKS):
        assert len({look.glyph for look in table.values()}) == len(table)


def test_every_stage_and_block_state_has_a_look():
    assert list(STAGE_LOOKS) == [stage.value for stage in Stage]
    assert BLOCK_LOOKS.keys() == BLOCK_STATES.keys()


def test_a_sparkline_goes_from_zero_to_its_peak():
    assert sparkline([0, 1, 2, 4, 8]) == "▁▂▃▅█"
    assert sparkline([0, 0]) == "▁▁"
    assert sparkline([3]) == ""
    assert sparkline([*range(100)], width=3) == "███"


# The command ----------------------------------------------------------------------------------------------------


class FakeServer:
    """Answers ``/status`` and ``/requests``; ``code`` is the status of every answer."""

    def __init__(self) -> None:
        self.code = 200
        self.views = [request(sequence=number) for number in range(1, 2501)]
        self.asked: list[str] = []
        self.keys: list[str | None] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                outer.keys.append(self.headers["authorization"])
                body = msgspec.json.encode(outer.answer(self.path))
                self.send_response(outer.code)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def answer(self, path: str) -> ServerView | RequestPage:
        if path == "/status":
            return status(NOW_S + len(self.asked))
        after = int(path.partition("after=")[2].partition("&")[0])
        found = self.views[max(0, after) :][:1000]
        return RequestPage(next=found[-1].sequence if found else after, dropped=0, requests=found)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    server.close()


def run(*arguments: str):
    return CliRunner().invoke(main, ["top", *arguments])


def test_once_prints_one_frame_and_ends(server):
    result = run(server.url, "--once", "--interval", "1ms", "--slo", "ttft=250ms,tpot=100ms")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.count("disagg top") == 1
    assert "250 ms" in result.stdout


def test_all_pages_of_requests_are_read_once(server):
    result = run(server.url, "--once", "--interval", "1ms", "--json")
    assert result.exit_code == 0, result.output
    after = [path.partition("after=")[2].partition("&")[0] for path in server.asked if "after" in path]
    assert after == ["-1000", "1000", "2000", "2500"]
    assert json.loads(result.stdout)["attainment"]["total"] == 2500


def test_json_is_one_line_a_frame(server):
    result = run(server.url, "--once", "--interval", "1ms", "--json")
    (line,) = result.stdout.splitlines()
    shown = json.loads(line)
    assert shown["status"]["model"] == "tiny"
    assert shown["ttft"]["percentiles"]["p50"] == pytest.approx(0.2)


def test_ctrl_c_ends_it_without_a_word(server, monkeypatch):
    naps = iter([None, None])

    def nap(_: float) -> None:
        if next(naps, "over") == "over":
            raise KeyboardInterrupt

    monkeypatch.setattr(command.time, "sleep", nap)
    result = run(server.url, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    assert len(result.stdout.splitlines()) == 2


def test_the_key_is_sent_and_asked_for(server):
    run(server.url, "--once", "--interval", "1ms", "--api-key", "secret")
    assert set(server.keys) == {"Bearer secret"}
    server.code = 401
    result = run(server.url, "--once")
    assert result.exit_code == 1
    assert "wants its API key: give --api-key or set DISAGG_API_KEY" in result.stderr


def test_no_server_says_how_to_start_one(server):
    server.close()
    result = run(server.url)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: no answer from {server.url}")
    assert "disagg serve" in result.stderr


def test_another_kind_of_server_is_recognised(server):
    server.code = 404
    assert "this is no disagg server" in run(server.url, "--once").stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--interval", "0s"], "'0s' is not a time"),
        (["--interval", "soon"], "'soon' is not a time"),
        (["--interval", "9" * 400 + "s"], "up to a day"),
        (["--window", "2000min"], "up to a day"),
        (["--slo", "fast"], "'fast' is not a pair of objectives"),
    ],
)
def test_bad_flags_are_refused(arguments, words):
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr


@pytest.mark.parametrize("error", [UnavailableError, ProtocolError, DisaggError])
def test_a_server_that_goes_away_is_waited_for_on_the_screen(server, monkeypatch, error):
    """The last frame stays, under a line that says so, until the server answers again."""
    frames: list[str] = []
    answers = iter([None, error("gone"), None])

    class Screen:
        def __init__(self, **_: object) -> None:
            pass

        def __enter__(self) -> "Screen":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, shown: Any, refresh: bool) -> None:
            console = Console(width=130, color_system=None)
            with console.capture() as captured:
                console.print(shown)
            frames.append(captured.get())

    with command.Watcher(server.url, None, History(60.0)) as watcher:
        ask = watcher.ask

        def ask_in_turn() -> None:
            answer = next(answers, "over")
            if answer == "over":
                raise KeyboardInterrupt
            if answer is not None:
                raise answer
            ask()

        monkeypatch.setattr(watcher, "ask", ask_in_turn)
        monkeypatch.setattr(command, "Live", Screen)
        with pytest.raises(KeyboardInterrupt):
            command._show_live(watcher, Slo(), 0.0)
    assert ["gone. Trying again" in shown for shown in frames] == [False, True, False]
