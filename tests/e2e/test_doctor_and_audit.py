"""``disagg doctor`` and ``disagg audit`` on a real server whose KV blocks travel over TCP."""

import json

from click.testing import CliRunner, Result
from server_process import END_DEADLINE_S, ServerProcess, completion, serving
from test_lifecycle import SMALL, wait_for

from disagg.cli.main import main


def run(server: ServerProcess, *arguments: str) -> Result:
    return CliRunner().invoke(main, [arguments[0], "--url", server.url, *arguments[1:]])


def test_a_server_over_tcp_is_measured_at_its_start_and_by_its_doctor() -> None:
    with serving(*SMALL, "--kv-link", "tcp", "--threads", "1") as server:
        wait_for(lambda: server.metric("disagg:kv_link_bytes_per_second") > 0, "the link to be measured")
        ended = run(server, "doctor", "--json")
        assert ended.exit_code in (0, 1), ended.stderr  # a busy machine may be far under its limit
        (link,) = (json.loads(line) for line in ended.stdout.splitlines())
        assert (link["source"], link["target"], link["link"]) == ("prefill-0", "decode-0", "tcp")
        assert link["why"] == "--kv-link tcp"
        assert min(link["bytes_per_s"], link["latency_s"], link["limit_bytes_per_s"]) > 0
        completion(server, "Once upon a time", max_tokens=4)
        assert server.metric("disagg:hand_over_bytes_total") > 0

        ended = run(server, "audit", "--json")
        assert ended.exit_code == 0, ended.stdout + ended.stderr
        audit = json.loads(ended.stdout)
        assert audit["is_exact"]
        assert [one["instance"] for one in audit["instances"]] == ["prefill-0", "decode-0"]
        for one in audit["instances"]:
            assert sum(one["blocks"].values()) == one["total"]
            assert one["num_held"] == 0

        decode = server.instances()[1]
        decode.suspend()
        try:
            ended = run(server, "audit")
        finally:
            decode.resume()
        assert ended.exit_code == 1
        assert "decode-0 gave no answer" in ended.stdout


def test_an_instance_whose_link_is_slower_than_asked_for_is_refused_in_words() -> None:
    with serving(*SMALL, "--threads", "1", "--min-kv-bandwidth", "1000TB") as server:
        wait_for(lambda: "--min-kv-bandwidth asks for" in server.text, "the instance to be refused")
        assert server.process.wait(END_DEADLINE_S) == 1  # nothing is left that could serve
