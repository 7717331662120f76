"""A real server that changes its own instances under load."""

import re
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
from click.testing import CliRunner
from fault_campaign import audit
from server_process import ServerProcess, completion, serving
from test_lifecycle import wait_for

from disagg.cli.main import main

SMALL = ("--max-model-len", "1024", "--kv-memory", "128MiB")
NUM_CLIENTS = 48


def states(server: ServerProcess) -> list[str]:
    return [one["state"] for one in server.get("/status").json()["instances"]]


def shown(server: ServerProcess) -> str:
    return CliRunner().invoke(main, ["ctl", "--url", server.url, "status"]).output


def keep_asking(server: ServerProcess, number: int, ended: Event) -> int:
    """Send one long prompt after the other; return how many were answered in full."""
    count = 0
    while not ended.is_set():
        prompt = f"{number}.{count}: " + "there was a house by the sea, " * 15
        answer = completion(server, prompt, max_tokens=2, temperature=0.0, ignore_eos=True)
        assert answer.usage.completion_tokens == 2
        count += 1
    return count


@pytest.mark.parametrize("routers", [(), pytest.param(("--routers", "2"), marks=pytest.mark.slow)], ids=["one", "two"])
def test_a_load_that_is_too_much_for_one_instance_gets_a_second_one(routers: tuple[str, ...]):
    scaling = ("--colocated", "1", "--autoscale", "colocated=1..2", "--slo", "ttft=2s", *routers)
    with serving(*SMALL, *scaling) as server, ThreadPoolExecutor(NUM_CLIENTS) as pool:
        ended = Event()
        clients = [pool.submit(keep_asking, server, number, ended) for number in range(NUM_CLIENTS)]
        try:
            wait_for(lambda: states(server) == ["ready", "ready"], "a second instance")
        finally:
            ended.set()
        assert all(client.result() > 0 for client in clients)
        wait_for(lambda: "autoscaling: 2 colocated of 1..2" in shown(server), "a review of both")
        assert "last change: 1 -> 2 colocated instances: predicted attainment" in shown(server)
        assert server.metric("disagg:scalings_total", role="colocated", direction="added") == 1


def ask_now_and_then(server: ServerProcess, ended: Event) -> list[list[int]]:
    """Send one request after the other with pauses; return the tokens of all answers."""
    answers = []
    while not ended.wait(0.7):
        fields = {"max_tokens": 40, "temperature": 0.0, "ignore_eos": True, "return_token_ids": True}
        answers.append(completion(server, "There was a house by the sea", **fields).choices[0].token_ids)
    return answers


@pytest.mark.slow
@pytest.mark.parametrize("routers", [(), ("--routers", "2")], ids=["one", "two"])
def test_an_instance_that_the_load_no_longer_needs_drains_and_leaves_and_no_request_fails(routers: tuple[str, ...]):
    scaling = ("--colocated", "1", "--autoscale", "colocated=1..2", "--slo", "ttft=2s", "--dtype", "float32", *routers)
    with serving(*SMALL, *scaling) as server, ThreadPoolExecutor(NUM_CLIENTS + 2) as pool:
        is_calm, ended = Event(), Event()
        crowd = [pool.submit(keep_asking, server, number, is_calm) for number in range(NUM_CLIENTS)]
        others = [pool.submit(ask_now_and_then, server, ended) for _ in range(2)]
        try:
            wait_for(lambda: states(server) == ["ready", "ready"], "a second instance")
            is_calm.set()
            wait_for(lambda: states(server) == ["ready"], "one instance to leave", deadline_s=300.0)
        finally:
            is_calm.set()
            ended.set()
        assert all(client.result() > 0 for client in crowd)
        answers = [tokens for client in others for tokens in client.result()]
        assert len(answers) > 10
        assert all(tokens == answers[0] for tokens in answers), "each answer is the one of an instance that stays"
        wait_for(lambda: len(server.instances()) == 1, "the process to end")
        wait_for(lambda: "last change: 2 -> 1 colocated instances: predicted attainment" in shown(server), "the reason")
        assert server.metric("disagg:scalings_total", role="colocated", direction="removed") == 1
        assert audit(server)["is_exact"]


@pytest.mark.slow
@pytest.mark.parametrize("routers", [(), ("--routers", "2")], ids=["one", "two"])
def test_a_plan_is_made_in_a_process_of_its_own_and_its_numbers_are_shown(routers: tuple[str, ...]):
    scaling = ("--prefill", "1", "--decode", "1", "--replan", "advise", "--slo", "ttft=30s,tpot=5s", *routers)
    with serving(*SMALL, *scaling) as server, ThreadPoolExecutor(NUM_CLIENTS) as pool:
        asked = [pool.submit(completion, server, f"story {number}", max_tokens=2) for number in range(130)]
        assert all(one.result().usage.completion_tokens for one in asked)
        told: list[str] = []
        wait_for(lambda: told.append(server.get("/status").json()["plan"]) or told[-1], "a plan at one of the routers")
        plan = told[-1]
        assert re.search(r"attainment \d+\.\d% with 1 prefill \+ 1 decode", plan), plan
        assert "what moved: the first requests" in plan
        assert states(server) == ["ready", "ready"], "advice changes nothing"
        wait_for(lambda: server.metric("disagg:plans_total") == 1, "the plan at whichever router answers")
        wait_for(lambda: f"re-planning: {plan}" in shown(server), "the same")
