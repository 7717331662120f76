"""``disagg bench transfer --url``: the control path of a server's hand-overs, beside the bytes."""

import json
from typing import Any

import pytest
from click.testing import CliRunner

from disagg.base.errors import DisaggError
from disagg.bench.client.hand_over_times import hand_over_times, measure_hand_overs
from disagg.bench.client.inquiries import RecentRequest
from disagg.bench.client.load_plan import Server
from disagg.cli.main import main
from disagg.measure.timeline import Stage
from openai_server import Received, Reply, fake_server


def stages(**seconds: float) -> dict[str, float]:
    return {**{stage.value: 0.0 for stage in Stage}, **seconds}


def handed_over(request_id: str, **seconds: float) -> dict[str, Any]:
    """One request, as ``/requests`` says it."""
    return {
        "request_id": request_id,
        "prefill_instance": "prefill-0",
        "decode_instance": "decode-0",
        "num_output_tokens": 12,
        "stages": stages(**seconds),
    }


TIMES = {"hand_over_control": 0.003, "hand_over": 0.001, "queue_decode": 0.001, "first_decode": 0.01, "decode": 0.1}


def test_the_control_path_stands_beside_the_bytes_and_what_a_client_sees() -> None:
    slow = {**TIMES, "hand_over_control": 0.006}
    requests = [RecentRequest(**handed_over(name, **times)) for name, times in (("a", TIMES), ("b", slow))]
    times = hand_over_times(requests, 512)
    assert (times.num_hand_overs, times.num_tokens) == (2, 512)
    assert times.control_s.mean == pytest.approx(0.0045)
    assert times.bytes_s.p50 == pytest.approx(0.001)
    assert times.control_share == pytest.approx(0.0045 / 0.0055)
    assert times.gap_ratio.mean == pytest.approx((1.5 + 1.8) / 2)


def test_what_was_not_handed_over_does_not_count() -> None:
    stayed = RecentRequest(request_id="a", prefill_instance="x", decode_instance="x", stages=stages(**TIMES))
    with pytest.raises(DisaggError, match="handed no request over"):
        hand_over_times([stayed, RecentRequest(request_id="b")], 512)
    moved = RecentRequest(**handed_over("c", **TIMES))
    assert hand_over_times([stayed, moved], 512).num_hand_overs == 1


class TellingServer:
    """Answers each request, and tells of it and of another one."""

    def __init__(self) -> None:
        self.pages: dict[str, Any] = {
            "/requests?after=0&limit=1000": {"next": 9, "requests": [handed_over("of somebody else", hand_over=9.0)]},
            "/requests?after=9&limit=1000": {"next": 9, "requests": []},
        }

    async def __call__(self, received: Received, reply: Reply) -> None:
        assert received.body["max_tokens"] == 12
        self.pages["/requests?after=0&limit=1000"]["requests"].append(handed_over(received.request_id, **TIMES))
        reply.status(200, {})


def test_a_servers_requests_are_sent_and_told_apart_from_those_of_others() -> None:
    behaviour = TellingServer()
    with fake_server(behaviour, behaviour.pages) as server:
        ended = CliRunner().invoke(
            main, ["bench", "transfer", "--url", server.url, "--requests", "3", "--tokens", "20", "--json"]
        )
    assert ended.exit_code == 0, ended.output
    row = json.loads(ended.stdout)
    assert (row["num_hand_overs"], row["num_tokens"]) == (3, 20)
    assert row["bytes_s"]["p99"] == pytest.approx(0.001)
    assert row["control_share"] == pytest.approx(0.75)
    prompts = [tuple(received.body["prompt"]) for received in server.received]
    assert len(set(prompts)) == 4  # one before, which does not count
    assert {len(prompt) for prompt in prompts} == {20}


def test_a_server_that_refuses_is_an_error_in_its_words() -> None:
    async def refuse(received: Received, reply: Reply) -> None:
        reply.status(400, {"error": {"message": "too long"}})

    with fake_server(refuse) as server, pytest.raises(DisaggError, match="400: too long"):
        measure_hand_overs(Server(server.url), 1, 20)
