"""Whole runs against a server in this process: how requests end, when a run is given up, what the client adapts to."""

import asyncio
import math
import os
import signal
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from disagg.base.errors import ConfigurationError, DisaggError, ProtocolError, UnavailableError
from disagg.bench.client.load_plan import (
    Asking,
    ClosedLoad,
    Endpoint,
    Limits,
    LoadPlan,
    OpenLoad,
    Server,
    SessionLoad,
)
from disagg.bench.client.prompt_texts import PromptSource, Words, english_text
from disagg.bench.client.run_load import LoadResult, run_load
from disagg.bench.client.running import INTERRUPTED
from disagg.bench.client.stopping import most_misses, reason_to_stop
from disagg.measure.record import Ending, RequestRecord, read_records, write_records
from disagg.measure.slo import Slo
from disagg.measure.workload import PrefixBlocks, RequestSpec, Session, SessionCall
from openai_server import FakeServer, Received, Reply, WordTokenizer, answer_at_once, fake_server

TOKENIZER = WordTokenizer()
SOURCE = PromptSource(Words(english_text(), TOKENIZER), TOKENIZER.encode)
FOREVER_S = 3600.0

Behaviour = Callable[[Received, Reply], Awaitable[None]]


def requests(count: int, *, output_len: int = 3, gap_s: float = 0.0) -> list[RequestSpec]:
    return [RequestSpec(prompt_len=20, output_len=output_len, arrival_s=index * gap_s) for index in range(count)]


def plan_for(fake: FakeServer, **changes: Any) -> LoadPlan:
    return replace(LoadPlan(Server(fake.url), OpenLoad(requests(3)), prompt_seed=1), **changes)


def by_index(*behaviours: Behaviour) -> Behaviour:
    """Treat each request of the run by a behaviour of its own; those before the run well."""

    async def behave(received: Received, reply: Reply) -> None:
        behaviour = behaviours[received.index] if received.index >= 0 else answer_at_once
        await behaviour(received, reply)

    return behave


async def never_answer(received: Received, reply: Reply) -> None:
    await asyncio.Event().wait()


async def answer_one_token(received: Received, reply: Reply) -> None:
    reply.open()
    reply.token(1)
    await asyncio.Event().wait()


def test_every_request_is_sent_once_and_recorded_in_the_order_of_the_load() -> None:
    with fake_server() as server:
        result = run_load(plan_for(server), SOURCE)
    assert [record.index for record in result.records] == [0, 1, 2]
    assert {record.ending for record in result.records} == {Ending.FINISHED}
    assert [record.num_output_tokens for record in result.records] == [3, 3, 3]
    assert sorted(received.index for received in server.received) == [-1, 0, 1, 2]
    assert len({received.request_id for received in server.received}) == 4
    assert result.stopped == ""
    assert result.model == "fake-model"


def test_requests_ask_for_the_workload_s_lengths() -> None:
    with fake_server() as server:
        run_load(plan_for(server, asking=Asking(min_tokens=True, extra={"top_k": 4})), SOURCE)
    body = server.received[-1].body
    assert len(TOKENIZER.encode(body["prompt"])) == 20
    assert body["max_tokens"] == body["min_tokens"] == 3
    assert body["ignore_eos"] is body["stream"] is True
    assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    assert (body["temperature"], body["top_k"], body["model"]) == (0.0, 4, "fake-model")


def test_prompts_go_as_token_ids_where_asked() -> None:
    with fake_server() as server:
        run_load(
            plan_for(server, server=Server(f"{server.url}/v1/", Endpoint.COMPLETION_TOKENS, "mine", "key")), SOURCE
        )
    received = server.received[-1]
    assert len(received.body["prompt"]) == 20
    assert received.body["model"] == "mine"
    assert received.headers["authorization"] == "Bearer key"
    assert received.path == "/v1/completions"


def test_texts_are_new_in_every_run_unless_a_seed_says_otherwise() -> None:
    with fake_server() as server:
        first = run_load(plan_for(server, prompt_seed=None), SOURCE)
        run_load(plan_for(server, prompt_seed=None), SOURCE)
        run_load(plan_for(server, prompt_seed=first.prompt_seed), SOURCE)
    texts = [{one.body["prompt"] for one in server.received[start : start + 4]} for start in (0, 4, 8)]
    assert not texts[0] & texts[1]
    assert texts[0] == texts[2]


@pytest.mark.parametrize("num_warmup", [1, 3])
def test_warm_up_puts_nothing_into_a_prefix_cache_that_is_measured(num_warmup: int) -> None:
    prefix = PrefixBlocks((7, 8), 8)
    load = OpenLoad([replace(request, prefix=prefix) for request in requests(3)])
    with fake_server() as server:
        run_load(plan_for(server, load=load, num_warmup=num_warmup), SOURCE)
    warm, measured = (
        [one.body["prompt"].split() for one in server.received if (one.index == -1) is before]
        for before in (True, False)
    )
    assert (len(warm), len(measured)) == (num_warmup, 3)
    assert len({tuple(words[:16]) for words in measured}) == 1
    assert not {tuple(words[:4]) for words in warm} & {tuple(words[:4]) for words in measured}
    assert {len(words) for words in warm} == {len(words) for words in measured}


async def answer_in_one_event(received: Received, reply: Reply) -> None:
    reply.open()
    reply.token(received.body["max_tokens"], " word" * received.body["max_tokens"], "length")
    reply.close_stream()


def test_answers_in_one_event_are_no_tokens_in_no_time() -> None:
    with fake_server(answer_in_one_event) as server:
        result = run_load(plan_for(server), SOURCE)
    assert all(record.num_output_tokens == 3 and math.isnan(record.tpot_s) for record in result.records)
    assert not any(record.meets(Slo(tpot_s=1e3)) for record in result.records)
    assert all(record.meets(Slo(ttft_s=1e3)) for record in result.records)
    assert any("3 of 3 answers came in one event: their TPOT is unknown" in note for note in result.notes)


def of_status(status: int) -> Behaviour:
    async def refuse(received: Received, reply: Reply) -> None:
        reply.status(status, {"error": {"message": f"because of {status}"}})

    return refuse


async def drop(received: Received, reply: Reply) -> None:
    reply.drop()


async def drop_in_stream(received: Received, reply: Reply) -> None:
    reply.open()
    reply.token(1)
    await asyncio.sleep(0)
    await reply.flush()
    reply.drop()


async def end_too_early(received: Received, reply: Reply) -> None:
    reply.open()
    reply.token(1)
    reply.chunk(b"")


async def fail_in_stream(received: Received, reply: Reply) -> None:
    reply.open()
    reply.token(1)
    reply.event({"error": {"message": "the instance died"}})
    reply.close_stream()


async def speak_nonsense(received: Received, reply: Reply) -> None:
    reply.raw(b"SSH-2.0-OpenSSH\r\n\r\n")


@pytest.mark.parametrize(
    ("behaviour", "ending", "error", "detail"),
    [
        (of_status(429), Ending.REFUSED, "HTTP 429", "because of 429"),
        (of_status(503), Ending.REFUSED, "HTTP 503", "because of 503"),
        (drop, Ending.UNREACHABLE, "connection lost", ""),
        (drop_in_stream, Ending.BROKEN, "stream ended early", ""),
        (end_too_early, Ending.BROKEN, "stream ended early", "without [DONE]"),
        (fail_in_stream, Ending.BROKEN, "error event", "the instance died"),
        (speak_nonsense, Ending.UNREACHABLE, "connection lost", "not HTTP"),
    ],
)
def test_failures_are_told_apart_and_do_not_touch_the_others(
    behaviour: Behaviour, ending: Ending, error: str, detail: str
) -> None:
    with fake_server(by_index(answer_at_once, behaviour, answer_at_once)) as server:
        first, failed, last = run_load(plan_for(server), SOURCE).records
    assert (failed.ending, failed.error) == (ending, error)
    assert detail in failed.detail
    assert first.ending is last.ending is Ending.FINISHED


def test_a_request_that_takes_too_long_is_given_up() -> None:
    limits = Limits(request_timeout_s=1.0)
    with fake_server(by_index(answer_at_once, answer_one_token, answer_at_once)) as server:
        _, failed, last = run_load(plan_for(server, limits=limits), SOURCE).records
    assert (failed.ending, failed.error) == (Ending.TIMED_OUT, "timeout")
    assert failed.num_output_tokens == 1
    assert last.ending is Ending.FINISHED


def test_a_server_that_goes_away_leaves_requests_without_connection() -> None:
    """The listening socket is closed in the run; the second call of the session finds nobody."""
    calls = (SessionCall(20, 2), SessionCall(20, 2))

    async def say_goodbye(received: Received, reply: Reply) -> None:
        if received.index < 0:
            await answer_at_once(received, reply)
        else:
            server.stop_listening()
            reply.open("connection: close\r\n")
            reply.raw(b"data: " + b'{"choices": [{"text": "a", "finish_reason": "length"}]}' + b"\n\n")
            await reply.flush()
            reply.drop_gently()

    with fake_server(say_goodbye) as server:
        plan = plan_for(server, load=SessionLoad([Session("a", calls, 0.0)]))
        first, second = run_load(plan, SOURCE).records
    assert first.ending is Ending.FINISHED
    assert (second.ending, second.error) == (Ending.UNREACHABLE, "ConnectError")


def test_a_kept_connection_that_the_server_has_closed_is_replaced() -> None:
    """Servers close idle connections; a request that meets that is sent again on a new one."""

    async def close_after_each(received: Received, reply: Reply) -> None:
        await answer_at_once(received, reply)
        await reply.flush()
        reply.drop_gently()

    with fake_server(close_after_each) as server:
        result = run_load(plan_for(server, load=ClosedLoad(requests(4), num_users=1)), SOURCE)
    assert {record.ending for record in result.records} == {Ending.FINISHED}


def test_connections_are_kept() -> None:
    with fake_server() as server:
        run_load(plan_for(server, load=ClosedLoad(requests(8), num_users=1)), SOURCE)
    assert server.num_streaming_connections == 1


def test_a_hopeless_server_ends_the_run_and_what_is_left_counts_as_missed() -> None:
    limits = Limits(max_outstanding=4)
    with fake_server(by_index(*[never_answer] * 50)) as server:
        result = run_load(plan_for(server, load=OpenLoad(requests(50, gap_s=0.001)), limits=limits), SOURCE)
    assert "more than 4 requests under way" in result.stopped
    assert {record.ending for record in result.records} == {Ending.UNFINISHED}
    assert len(result.records) == 50
    assert len(server.received) <= 1 + 5


def test_a_run_ends_when_the_target_is_out_of_reach() -> None:
    """Two of ten requests may miss: the third that waits too long for its first token decides."""
    limits = Limits(target=0.8, slo=Slo(ttft_s=0.05))
    with fake_server(by_index(*[never_answer] * 3)) as server:
        load = OpenLoad([*requests(3), *(replace(one, arrival_s=FOREVER_S) for one in requests(7))])
        result = run_load(plan_for(server, load=load, limits=limits), SOURCE)
    assert "80% is out of reach" in result.stopped
    assert not any(record.meets(limits.slo) for record in result.records)


def test_a_run_ends_at_its_deadline_with_what_came_so_far() -> None:
    with fake_server(by_index(answer_at_once, answer_one_token)) as server:
        load = OpenLoad(requests(2))
        result = run_load(plan_for(server, load=load, limits=Limits(deadline_s=1.0)), SOURCE)
    finished, unfinished = result.records
    assert "deadline" in result.stopped
    assert finished.ending is Ending.FINISHED
    assert (unfinished.ending, unfinished.num_output_tokens) == (Ending.UNFINISHED, 1)


def test_interrupting_ends_the_run_with_what_is_there() -> None:
    def interrupt(received: Received, reply: Reply) -> Awaitable[None]:
        os.kill(os.getpid(), signal.SIGINT)
        return never_answer(received, reply)

    before = signal.getsignal(signal.SIGINT)
    with fake_server(by_index(answer_at_once, interrupt)) as server:
        calls = (SessionCall(20, 3), SessionCall(20, 3), SessionCall(20, 3))
        result = run_load(plan_for(server, load=SessionLoad([Session("a", calls, 0.0)])), SOURCE)
    assert result.stopped == INTERRUPTED
    assert [record.ending for record in result.records] == [Ending.FINISHED, Ending.UNFINISHED, Ending.UNFINISHED]
    assert signal.getsignal(signal.SIGINT) is before


def test_records_of_unfinished_and_unsent_requests_can_be_saved(tmp_path: Any) -> None:
    with fake_server(by_index(never_answer)) as server:
        load = OpenLoad([*requests(1), RequestSpec(20, 3, FOREVER_S)])
        result = run_load(plan_for(server, load=load, limits=Limits(deadline_s=0.1)), SOURCE)
    write_records(result.records, tmp_path / "records.jsonl")
    back = list(read_records(tmp_path / "records.jsonl"))
    assert [record.ending for record in back] == [Ending.UNFINISHED] * 2
    assert math.isnan(back[1].sent_s)
    assert back[1].due_s == FOREVER_S


def test_a_closed_loop_never_has_more_under_way_than_users() -> None:
    running, most = set[int](), list[int]()

    async def count(received: Received, reply: Reply) -> None:
        running.add(received.index)
        most.append(len(running))
        await asyncio.sleep(0.001)
        running.discard(received.index)
        await answer_at_once(received, reply)

    with fake_server(count) as server:
        result = run_load(plan_for(server, load=ClosedLoad(requests(12), num_users=3)), SOURCE)
    assert max(most) <= 3
    assert all(record.ending is Ending.FINISHED for record in result.records)


def test_sessions_are_recorded_with_their_turns() -> None:
    sessions = [Session(name, (SessionCall(20, 2), SessionCall(30, 2)), 0.0) for name in ("a", "b")]
    with fake_server() as server:
        result = run_load(plan_for(server, load=SessionLoad(sessions)), SOURCE)
    assert [(one.session, one.turn, one.prompt_len) for one in result.records] == [
        ("a", 0, 20),
        ("a", 1, 30),
        ("b", 0, 20),
        ("b", 1, 30),
    ]
    assert result.records[1].due_s >= result.records[0].finished_s


def test_a_server_that_refuses_continuous_usage_is_asked_without_it() -> None:
    async def strict(received: Received, reply: Reply) -> None:
        if "continuous_usage_stats" in received.body["stream_options"]:
            reply.status(400, {"error": {"message": "unknown field"}})
        else:
            await answer_at_once(received, reply)

    with fake_server(strict) as server:
        result = run_load(plan_for(server), SOURCE)
    assert all(record.ending is Ending.FINISHED for record in result.records)
    assert "continuous_usage_stats" in result.notes[0]


def counting(num_added: int) -> Behaviour:
    """Count words, as the test's tokenizer does, and what a chat template would add."""

    async def answer(received: Received, reply: Reply) -> None:
        text = received.body.get("prompt") or received.body["messages"][0]["content"]
        reply.open()
        reply.token(1)
        reply.token(2, finish_reason="length")
        reply.close_stream({"completion_tokens": 2, "prompt_tokens": len(text.split()) + num_added})

    return answer


def test_the_length_of_an_unknown_chat_template_is_learned_from_the_server() -> None:
    with fake_server(counting(num_added=12)) as server:
        chat = Server(server.url, Endpoint.CHAT)
        result = run_load(plan_for(server, server=chat, load=OpenLoad(requests(2, output_len=2))), SOURCE)
    sent = server.received[-1]
    assert sent.path == "/v1/chat/completions"
    assert len(sent.body["messages"][0]["content"].split()) == 20 - 12
    assert result.notes == ()
    assert result.records[0].prompt_len == 20


def test_a_server_that_counts_otherwise_or_answers_shorter_is_told() -> None:
    with fake_server(counting(num_added=5)) as server:
        result = run_load(plan_for(server, load=OpenLoad(requests(2, output_len=8))), SOURCE)
    lengths, answers = result.notes
    assert "2 of 2 prompts" in lengths
    assert "24 tokens instead of 20" in lengths
    assert "2 of 2 answers are shorter than asked" in answers


def test_prompts_that_cannot_be_so_short_are_told() -> None:
    with fake_server() as server:
        load = OpenLoad([RequestSpec(1, 2, 0.0), RequestSpec(9, 2, 0.0)])
        result = run_load(plan_for(server, load=load), SOURCE)
    assert "1 prompts are longer than asked: the shortest has 2 tokens" in result.notes[0]
    assert [record.prompt_len for record in result.records] == [2, 9]


def test_stages_of_a_server_that_tells_them_are_added() -> None:
    views: list[dict[str, Any]] = []

    async def remember(received: Received, reply: Reply) -> None:
        instances = {"prefill_instance": "prefill-0", "decode_instance": "decode-0"}
        views.append({"request_id": received.request_id, "stages": {"prefill": 0.5, "decode": 1.5}, **instances})
        await answer_at_once(received, reply)

    with fake_server(remember) as server:
        server.pages["/requests?after=0&limit=1000"] = {"next": 9, "dropped": 0, "requests": views}
        server.pages["/requests?after=9&limit=1000"] = {"next": 9, "dropped": 0, "requests": []}
        result = run_load(plan_for(server), SOURCE)
    assert [record.stages for record in result.records] == [{"prefill": 0.5, "decode": 1.5}] * 3
    assert result.records[0].instances == ("prefill-0", "decode-0")


@pytest.mark.parametrize(
    ("behaviour", "kind", "words"),
    [
        (of_status(401), DisaggError, "HTTP 401: because of 401"),
        (of_status(400), DisaggError, "HTTP 400: because of 400"),
        (drop, UnavailableError, "connection lost"),
    ],
)
def test_a_first_request_that_fails_ends_everything(behaviour: Behaviour, kind: type[Exception], words: str) -> None:
    with fake_server(behaviour) as server, pytest.raises(kind, match=words):
        run_load(plan_for(server), SOURCE)


def test_no_server_is_said_in_words() -> None:
    with fake_server() as server:
        url = server.url
    for model in ("", "named"):
        with pytest.raises(UnavailableError, match="start a server with"):
            run_load(LoadPlan(Server(url, model=model), OpenLoad(requests(1))), SOURCE)


@pytest.mark.parametrize("url", ["ftp://host", "http://", "127.0.0.1:80", "http://host:port"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="not a URL"):
        run_load(LoadPlan(Server(url, model="m"), OpenLoad(requests(1))), SOURCE)


def test_a_server_of_another_kind_is_told_apart() -> None:
    with fake_server(pages={"/v1/models": {"nothing": 1}}) as server, pytest.raises(ProtocolError, match="--model"):
        run_load(plan_for(server), SOURCE)


def test_a_run_in_a_thread_works_without_signals() -> None:
    results: list[LoadResult] = []
    with fake_server() as server:
        thread = threading.Thread(target=lambda: results.append(run_load(plan_for(server), SOURCE)))
        thread.start()
        thread.join(60)
    assert len(results[0].records) == 3


def test_watching_tells_how_far_a_run_is() -> None:
    seen: list[int] = []
    with fake_server(by_index(answer_at_once, never_answer)) as server:
        plan = plan_for(server, load=OpenLoad(requests(2)), limits=Limits(deadline_s=1.2))
        run_load(plan, SOURCE, lambda progress: seen.append(progress.num_finished * 10 + progress.num_running))
    assert seen
    assert seen[-1] == 11


def test_the_client_s_own_faults_are_named() -> None:
    with fake_server() as server:
        result = run_load(plan_for(server), SOURCE)
    late = [RequestRecord(index=0, request_id="", prompt_len=1, max_output_len=1, due_s=0.0, sent_s=0.5)]
    slow = replace(result, client_cpu_s=result.wall_s, records=tuple(late))
    assert any("0.5" in fault or "500 ms" in fault for fault in slow.client_faults())
    assert any("1.00 of a core" in fault for fault in slow.client_faults())


@pytest.mark.parametrize(("target", "num_requests", "misses"), [(0.9, 10, 1), (0.9, 9, 0), (0.9, 100, 10), (1.0, 5, 0)])
def test_how_many_may_miss(target: float, num_requests: int, misses: int) -> None:
    assert most_misses(target, num_requests) == misses


def test_rules_that_end_a_run() -> None:
    limits = Limits(deadline_s=10, max_outstanding=5, target=0.9)

    def reason(elapsed_s: float = 1, num_outstanding: int = 1, num_missed: int = 0) -> str | None:
        return reason_to_stop(
            limits,
            elapsed_s=elapsed_s,
            num_requests=100,
            num_outstanding=num_outstanding,
            num_missed=num_missed,
        )

    assert reason() is None
    assert reason(num_outstanding=5, num_missed=10, elapsed_s=10) is None
    assert "deadline" in str(reason(elapsed_s=10.5))
    assert "more than 5" in str(reason(num_outstanding=6))
    assert "11 of 100" in str(reason(num_missed=11))
