"""A whole server whose KV blocks travel through NIXL, where that is installed: answers, a death, the audit."""

import json
import subprocess
import sys

import pytest
from server_process import END_DEADLINE_S, completion, serving
from test_lifecycle import wait_for

pytest.importorskip("nixl_cu12", reason="NIXL is not installed: pip install 'disagg[nixl]'")

COMMON = ("--dtype", "float32", "--max-model-len", "512", "--kv-memory", "128MiB", "--threads", "1")
PROMPT = "Once upon a time, in a village by the sea, there lived a"
GREEDY = {"max_tokens": 24, "temperature": 0.0, "ignore_eos": True}


def test_answers_over_nixl_are_those_of_one_instance_also_after_the_death_of_the_source() -> None:
    with serving("--colocated", "1", *COMMON) as server:
        alone = completion(server, PROMPT, **GREEDY).choices[0].text
    with serving(*COMMON, "--kv-link", "nixl", "--no-prefix-caching") as server:
        assert completion(server, PROMPT, **GREEDY).choices[0].text == alone
        assert server.metric("disagg:kv_link", link="nixl") == 1
        read = server.metric("disagg:hand_over_bytes_total")
        assert read > 0

        prefill, _ = server.instances()
        prefill.kill()
        prefill.wait(END_DEADLINE_S)
        wait_for(lambda: server.get("/ready").status_code == 200, "the prefill instance to be back")
        assert completion(server, PROMPT, **GREEDY).choices[0].text == alone
        wait_for(lambda: server.metric("disagg:hand_over_bytes_total") == 2 * read, "its blocks to be read, too")
        assert server.metric("disagg:hand_over_failures_total") == 0

        audit = [sys.executable, "-m", "disagg.cli.main", "audit", "--url", server.url, "--json"]
        ended = subprocess.run(audit, capture_output=True, text=True, timeout=60)
        assert json.loads(ended.stdout)["is_exact"], ended.stdout
