"""Several routers before one fleet, in real processes: answers, deaths of routers and instances, restarts, the end."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import psutil
import pytest
import zmq
from server_process import ServerProcess, completion, serving
from test_join import EXACT, answers, door_of, joined, states
from test_lifecycle import assert_no_block_is_held, wait_for

SMALL = ("--routers", "2", "--max-model-len", "2048", "--kv-memory", "256MiB", "--instance-wait-s", "120")
NUM_TOKENS = 200


@dataclass
class Story:
    """What a client saw of a streamed answer."""

    num_tokens: int = 0
    error: str = ""


def routers(server: ServerProcess) -> list[psutil.Process]:
    """The routers' processes."""
    return [child for child in psutil.Process(server.process.pid).children() if "router_process" in command_of(child)]


def command_of(process: psutil.Process) -> str:
    """What a process was started with; "" of one that has just ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def num_clients(router: psutil.Process) -> int:
    return sum(one.status == psutil.CONN_ESTABLISHED for one in router.net_connections("tcp"))


def tell(server: ServerProcess, max_tokens: int, begun: "Future[None]") -> Story:
    """Read a stream to its end on a connection of its own; ``begun`` is done with its first token."""
    story = Story()
    try:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120.0) as client:
            stream = client.completions.create(
                model=server.model,
                prompt="Tell me",
                max_tokens=max_tokens,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
            for chunk in stream:
                if chunk.usage is not None:
                    story.num_tokens = chunk.usage.completion_tokens
                if not begun.done():
                    begun.set_result(None)
    except (openai.APIError, httpx.HTTPError) as error:
        story.error = str(error)
        if not begun.done():
            begun.set_result(None)
    return story


def tell_on_both(server: ServerProcess, pool: ThreadPoolExecutor, max_tokens: int) -> "list[Future[Story]]":
    """Begin streams until each router has some."""
    stories: list[Future[Story]] = []
    assert server.model  # asked for now, as its connection is kept, too
    idle = {router: num_clients(router) for router in routers(server)}  # connections that are kept for a next request
    while not all(num_clients(router) > num for router, num in idle.items()):
        begun: Future[None] = Future()
        stories.append(pool.submit(tell, server, max_tokens, begun))
        begun.result(timeout=60)
        assert len(stories) < 40, "one router takes all clients"
    return stories


def is_everywhere(server: ServerProcess, instance: str, state: str) -> bool:
    """True when every router that answered says so of an instance; "none" where it knows it not."""
    return {states(server).get(instance, "none") for _ in range(6)} == {state}


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with serving(*SMALL) as server:
        yield server


def test_all_routers_answer_alike_and_one_scrape_counts_them_all(server: ServerProcess) -> None:
    before = server.metric("vllm:generation_tokens_total")
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda _: completion(server, "Rivers are", max_tokens=20, temperature=0), range(10)))
    assert len({answer.choices[0].text for answer in answers}) == 1
    tokens = sum(answer.usage.completion_tokens for answer in answers)
    assert server.metric("vllm:generation_tokens_total") == before + tokens
    assert_no_block_is_held(server)


def test_a_router_that_is_killed_takes_only_its_own_streams_along(server: ServerProcess) -> None:
    with ThreadPoolExecutor(40) as pool:
        stories = tell_on_both(server, pool, NUM_TOKENS)
        victim, other = routers(server)
        victim.kill()
        told = [story.result(timeout=90) for story in stories]
    assert {story.num_tokens for story in told if not story.error} == {NUM_TOKENS}
    assert any(story.error for story in told)
    wait_for(lambda: len(routers(server)) == 2 and victim not in routers(server), "a new router")
    assert other in routers(server)
    assert_no_block_is_held(server)
    assert server.get("/debug/audit").json()["faults"] == []


def test_an_instance_that_is_killed_fails_no_request_of_any_router(server: ServerProcess) -> None:
    with ThreadPoolExecutor(40) as pool:
        stories = tell_on_both(server, pool, NUM_TOKENS)
        (victim,) = [one["pid"] for one in server.get("/status").json()["instances"] if one["role"] == "decode"]
        os.kill(victim, signal.SIGKILL)
        told = [story.result(timeout=90) for story in stories]
    assert told == [Story(NUM_TOKENS)] * len(told)
    wait_for(lambda: server.get("/ready").status_code == 200, "the restarted instance")
    assert server.metric("disagg:instance_losses_total", instance="decode-0") == 1, "both routers lost it"
    wait_for(lambda: server.metric("disagg:kv_link_bytes_per_second") > 0, "the link to be measured")
    assert_no_block_is_held(server)


def test_a_hangup_starts_the_routers_anew_and_loses_no_request(server: ServerProcess) -> None:
    before, instances = routers(server), server.instances()
    with ThreadPoolExecutor(40) as pool:
        stories = tell_on_both(server, pool, NUM_TOKENS)
        server.process.send_signal(signal.SIGHUP)
        while any(router.is_running() and router in before for router in routers(server)):
            stories.append(pool.submit(tell, server, 20, Future()))
            stories[-1].result(timeout=60)
        told = [story.result(timeout=90) for story in stories]
    assert [story.error for story in told if story.error] == []
    wait_for(lambda: len(routers(server)) == 2, "two routers")
    assert server.instances() == instances
    assert completion(server, "Hello", max_tokens=3).usage.completion_tokens > 0


def test_commands_reach_all_routers(server: ServerProcess) -> None:
    added = httpx.post(f"{server.url}/admin/instances", json={"role": "decode"}, timeout=30).json()["instance"]
    wait_for(lambda: is_everywhere(server, added, "ready"), "the new instance at both routers")
    assert httpx.post(f"{server.url}/admin/instances/{added}/remove", timeout=30).status_code == 202
    wait_for(lambda: is_everywhere(server, added, "none"), "its end at both routers")
    refused = httpx.post(f"{server.url}/admin/instances/decode-0/remove", timeout=30)
    assert refused.status_code == 409
    assert "no request could be served" in refused.text


@pytest.mark.slow
def test_an_instance_of_another_host_serves_all_routers_and_survives_them(tmp_path: Path) -> None:
    keys, events = ("--keys", str(tmp_path / "keys")), f"ipc://{tmp_path}/events"
    listening = ("--listen-instances", "127.0.0.1:0", "--kv-events", events, "--instance-wait-s", "120")
    with serving(*EXACT, *keys, *listening, "--routers", "2") as server, zmq.Context() as context:
        expected = answers(server, 6)
        with (
            context.socket(zmq.SUB) as subscriber,
            joined("--join", door_of(server), "--role", "decode", *keys, *EXACT, "--kv-link", "tcp") as joiner,
        ):
            subscriber.connect(events)
            subscriber.subscribe("kv@decode-1@")
            wait_for(lambda: is_everywhere(server, "decode-1", "ready"), "decode-1 at both routers")
            assert httpx.post(f"{server.url}/admin/instances/decode-0/drain", timeout=30).status_code == 202
            assert answers(server, 6) == expected
            assert subscriber.poll(30_000), "what is cached there is published"

            victim = routers(server)[0]
            victim.kill()
            wait_for(lambda: len(routers(server)) == 2 and victim not in routers(server), "a new router")
            wait_for(lambda: is_everywhere(server, "decode-1", "ready"), "decode-1 at the new router")
            assert answers(server, 6) == expected

            url = f"{server.url}/admin/instances/decode-0/drain"
            assert httpx.post(url, json={"undo": True}, timeout=30).status_code == 202
            os.kill(joiner.engine().pid, signal.SIGKILL)
            assert answers(server, 6) == expected
            wait_for(lambda: is_everywhere(server, "decode-1", "ready"), "decode-1 is back")
            assert joiner.end() == 0
        wait_for(lambda: is_everywhere(server, "decode-1", "none"), "decode-1 has left")
        assert answers(server, 6) == expected
        assert server.get("/debug/audit").json()["faults"] == []


def test_the_end_leaves_no_process() -> None:
    with serving(*SMALL, "--colocated", "1") as server:  # of its own, which no other test needs any more
        processes = psutil.Process(server.process.pid).children(recursive=True)
        assert server.end(signal.SIGINT) == 0
    assert not [process for process in processes if process.is_running()]


def test_a_tenants_bound_holds_over_all_routers(tmp_path: Path) -> None:
    file = tmp_path / "tenants.yaml"
    file.write_text("tenants:\n  - {name: nightly, key: sk-nightly, max_requests: 2}\n  - {name: day, key: sk-day}\n")
    body = {"prompt": "Tell me", "max_tokens": 1900, "stream": True, "ignore_eos": True}

    def status(key: str) -> int:
        """What a short request on a connection of its own, to either router, is answered."""
        asked = {"prompt": "Hello", "max_tokens": 1}
        return httpx.post(
            f"{server.url}/v1/completions", json=asked, headers={"Authorization": f"Bearer {key}"}, timeout=60
        ).status_code

    lines: list[Iterator[str]] = []
    with serving(*SMALL, "--colocated", "1", "--tenants", str(file)) as server, ExitStack() as streams:
        for _ in range(2):
            client = streams.enter_context(httpx.Client(headers={"Authorization": "Bearer sk-nightly"}, timeout=60))
            answer = streams.enter_context(client.stream("POST", f"{server.url}/v1/completions", json=body))
            assert answer.status_code == 200
            lines.append(answer.iter_lines())  # kept, as a stream ends with who reads it
            next(lines[-1])
        wait_for(lambda: {status("sk-nightly") for _ in range(6)} == {429}, "both routers to know of both streams")
        assert status("sk-day") == 200
        streams.close()
        wait_for(lambda: {status("sk-nightly") for _ in range(6)} == {200}, "both routers to know of their end")


@pytest.mark.slow
def test_a_stream_that_a_restart_cannot_wait_for_is_told() -> None:
    with serving(*SMALL, "--restart-timeout-s", "0") as server, ThreadPoolExecutor(1) as pool:
        begun: Future[None] = Future()
        story = pool.submit(tell, server, 1900, begun)
        begun.result(timeout=60)
        httpx.post(f"{server.url}/admin/restart", timeout=30).raise_for_status()
        assert "--restart-timeout-s" in story.result(timeout=90).error
