"""The dashboard: a page that needs nothing from elsewhere, and figures that agree with ours."""

import asyncio
import base64
import hashlib
import json
import re
import shutil
import subprocess
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from api_site import Serve

from disagg.measure.timeline import Stage
from disagg.serve.api.instance_metrics import BLOCK_STATES
from disagg.serve.api.pages import Page

DATA = resources.files("disagg.serve.api").joinpath("dashboard_data.js").read_text()
NODE = shutil.which("node")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMIUM_FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--virtual-time-budget=3000", "--dump-dom"),
]


def run_script(program: str) -> Any:
    """Run a JavaScript expression after the page's own functions, and return what it gives."""
    if NODE is None:
        pytest.skip("node is not installed: the page's arithmetic is not checked")
    told = subprocess.run(
        [NODE, "-e", f"{DATA}\nconsole.log(JSON.stringify({program}))"], capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stderr
    return json.loads(told.stdout)


def ended(at_s: float, **fields: Any) -> dict[str, Any]:
    return {
        "arrival_unix_s": at_s - 1,
        "finish_reason": "stop",
        "ttft_s": 0.2,
        "tpot_s": 0.05,
        "e2e_s": 1.0,
        "stages": {},
        "stamps": {"finished": 1.0},
        **fields,
    }


def status(at_s: float, decoded: int, num_hand_overs: int = 0) -> dict[str, Any]:
    instance = {"instance": "decode-0", "num_waiting": 1, "num_running": 2, "num_steps_total": 0}
    return {
        "now_unix_s": at_s,
        "num_under_way": 3,
        "hand_overs": {"num_total": num_hand_overs, "bytes_total": 0, "seconds_total": 0.0},
        "instances": [{**instance, "num_prefill_tokens_total": 0, "num_decode_tokens_total": decoded}],
    }


# The page -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/dashboard"])
async def test_a_page_may_run_what_is_in_it_and_ask_its_server_alone(serve: Serve, path: str) -> None:
    page = await (await serve()).http.get(path)
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert (policy["default-src"], policy["connect-src"]) == ("'none'", "'self'")
    for directive, tag in (("style-src", "style"), ("script-src", "script")):
        parts = re.findall(f"<{tag}>(.*?)</{tag}>", page.text, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in parts]
        assert policy[directive].split() == [f"'sha256-{digest}'" for digest in digests]
    assert not re.search(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="(?!data:)', page.text)
    assert not re.search(r"\s(?:style|on\w+)=\"", page.text), "the policy would refuse it"


async def test_the_front_page_leads_to_the_dashboard(serve: Serve) -> None:
    site = await serve()
    assert '<a class="more" href="/dashboard">' in (await site.http.get("/")).text
    assert "<title>disagg · live</title>" in (await site.http.get("/dashboard")).text


def test_a_page_whose_parts_are_missing_is_a_fault_at_start() -> None:
    with pytest.raises(FileNotFoundError):
        Page("nowhere.html")


# Its arithmetic -------------------------------------------------------------------------------------------------


def test_stages_and_block_states_are_ours_in_our_order() -> None:
    assert run_script("STAGES.map(stage => stage.name)") == [stage.value for stage in Stage]
    assert run_script("STAGES[NUM_STAGES_TO_SECOND_TOKEN - 1].name") == Stage.FIRST_DECODE.value
    assert set(run_script("BLOCK_STATES")) == set(BLOCK_STATES)


def test_percentiles_are_those_of_numpy() -> None:
    values = [0.31, 0.2, 0.9, 0.4, 0.25, 7.0]
    requests = [*({"ttft_s": value} for value in values), {"ttft_s": None}]
    shown = run_script(f"percentiles({json.dumps(requests)}, 'ttft_s')")
    assert shown["count"] == 6
    assert [shown[name] for name in ("p50", "p90", "p99")] == pytest.approx(np.percentile(values, (50, 90, 99)))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("250ms", 0.25), ("0.25s", 0.25), ("250", 0.25), (" 1.5 s ", 1.5), ("", None), ("fast", "NaN"), ("0ms", "NaN")],
)
def test_objectives_are_read_as_people_write_them(text: str, seconds: float | str | None) -> None:
    told = run_script(f"(limit => Number.isNaN(limit) ? 'NaN' : limit)(parseLatency({text!r}))")
    assert told == seconds


def test_a_request_keeps_the_objectives_when_it_ended_well_and_in_time() -> None:
    cases = {
        "kept": ended(0),
        "slow": ended(0, ttft_s=0.3),
        "single token": ended(0, tpot_s=None),
        "failed": ended(0, finish_reason="error"),
        "left": ended(0, finish_reason="abort"),
    }
    kept = run_script(f"{json.dumps(list(cases.values()))}.map(one => meets(one, {{ ttft: 0.25, tpot: null }}))")
    assert dict(zip(cases, kept, strict=True)) == {
        "kept": True,
        "slow": False,
        "single token": True,
        "failed": False,
        "left": False,
    }


def test_rates_are_growth_over_the_servers_own_time() -> None:
    answers = [status(100, 50), status(101, 60, num_hand_overs=4), status(103, 8, num_hand_overs=4)]
    samples = run_script(
        f"(store => {{ {json.dumps(answers)}.forEach(one => store.takeStatus(one));"
        "return store.samples.map(one => [one.decodeRate, one.handOverRate, one.waiting]); })(new Store())"
    )
    assert samples == [[0, 0, 1], [10, 4, 1], [4, 0, 1]], "the instance was restarted before the third answer"


def test_requests_of_the_window_are_counted_where_they_ended() -> None:
    requests = [ended(939), ended(950.5), ended(951), ended(999.5)]
    shown = run_script(
        f"(store => {{ store.takeStatus({json.dumps(status(1000, 0))});"
        f"store.takeRequests({{ next: 9, dropped: 2, requests: {json.dumps(requests)} }});"
        "return { after: store.after, inWindow: store.requestsOf(60).length, begin: store.begin(60),"
        "perSecond: store.endedPerSecond(940, 6).map(part => part.value) }; })(new Store())"
    )
    assert shown == {"after": 9, "inWindow": 3, "begin": 940, "perSecond": [0, 0.2, 0, 0, 0, 0.1]}


def test_what_a_failed_request_waited_for_in_vain_is_told() -> None:
    failed = ended(0, finish_reason="error", stages={"prefill": 1.0}, stamps={"finished": 3.0})
    assert run_script(f"[lostSeconds({json.dumps(failed)}), lostSeconds({json.dumps(ended(0))})]") == [2, 0]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"state": "ready", "detail": ""}, ""),
        ({"state": "lost", "detail": "killed by SIGKILL"}, "killed by SIGKILL"),
        ({"state": "starting", "detail": "starting"}, "being started"),
        ({"state": "starting", "detail": "weights 40%"}, "being started: weights 40%"),
        ({"state": "draining", "num_sequences": 1}, "gets nothing new: 1 sequence still on it"),
        ({"state": "draining", "num_sequences": 0}, "gets nothing new: holds nothing any more"),
        ({"state": "draining", "num_sequences": 3, "is_leaving": True}, "leaves: 3 sequences still on it"),
    ],
)
def test_an_instance_that_is_not_ready_says_what_it_waits_for(fields: dict[str, Any], words: str) -> None:
    assert run_script(f"wordsOf({json.dumps(fields)})") == words


def test_what_was_decided_of_instances_is_told_with_its_numbers() -> None:
    known = {"role": "decode", "count": 2, "fewest": 1, "most": 3, "attainment": 0.994, "attainment_with_fewer": 0.5}
    unknown = {**known, "attainment": None, "attainment_with_fewer": None, "last_change": "1 -> 2 decode instances"}
    shown = run_script(f"decisionsOf({json.dumps({'scaling': [known, unknown], 'plan': 'staying'})})")
    assert shown == [
        ["autoscaling", "2 decode of 1..3; predicted attainment 99%, 50% with 1"],
        ["autoscaling", "2 decode of 1..3; last change: 1 -> 2 decode instances"],
        ["re-planning", "staying"],
    ]
    assert run_script("decisionsOf({ scaling: [], plan: '' })") == []


# In a browser ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium: the page is not run")
async def test_a_browser_shows_instances_and_requests(serve: Serve, tmp_path: Path) -> None:
    site = await serve()
    await site.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 3}, headers={"X-Request-Id": "mine"})
    assert CHROMIUM is not None
    browser = await asyncio.create_subprocess_exec(
        CHROMIUM,
        *CHROMIUM_FLAGS,
        f"--user-data-dir={tmp_path}",
        f"{site.url}/dashboard?ttft=1us",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        stdout, _ = await browser.communicate()
    shown = re.sub(r"<script>.*?</script>", "", stdout.decode(), flags=re.DOTALL)
    for words in ("prefill-0", "decode-0", "KV blocks: 25 held, 15 cached of 100", "mine", "0 of 1 requests"):
        assert words in shown, words
    assert 'id="state" class="pill good"' in shown
