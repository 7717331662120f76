"""Bodies that would hold up everybody: bounded in time and memory, aside from the event loop."""

import asyncio
import json
import os
import select
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import openai
import pytest
from api_site import ANSWER, Serve

from disagg.base.errors import InvalidRequestError, OverloadedError, UnavailableError
from disagg.models.chat_template import ChatTemplate
from disagg.serve.api import preparers as module
from disagg.serve.api.preparers import SHORT_BODY_BYTES, Preparation, Preparers, prepare_all
from disagg.serve.api.preparing import Task
from disagg.serve.api.served_model import ServedModel

MESSAGES = [{"role": "user", "content": "Hi"}]
MAX_MODEL_LEN = 256
BOMBS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "branching recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "one long instruction": "{% set n = messages | length + 8 %}{{ n ** n ** n ** n }}",
    "a constant that takes for ever": "{{ 9 ** 9 ** 9 ** 9 }}",
    "a long text": "{{ 'a' * 10 ** 11 }}",
    "doubling": "{% set ns = namespace(a='aa') %}{% for _ in range(99) %}{% set ns.a = ns.a + ns.a %}{% endfor %}",
    "a wide filter": "{{ 'a' | center(10 ** 11) }}",
}


def body(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


@contextmanager
def preparing(model: ServedModel, template: str | None = None, **settings: Any) -> Iterator[Preparers]:
    if template is not None:
        model = replace(model, chat_template=ChatTemplate(template, {}))
    with Preparers(model, **settings) as preparers:
        yield preparers


@pytest.fixture(scope="module")
def preparers(served_model: ServedModel) -> Iterator[Preparers]:
    with Preparers(served_model) as running:
        yield running


@pytest.mark.parametrize("template", BOMBS.values(), ids=BOMBS)
async def test_a_template_that_takes_for_ever_is_a_bad_request_and_holds_up_nobody(
    serve: Serve, served_model: ServedModel, template: str
) -> None:
    with preparing(served_model, template, cpu_s=0.4) as preparers:
        site = await serve(preparers=preparers)
        chat = asyncio.create_task(site.http.post("/v1/chat/completions", json={"messages": MESSAGES}, timeout=60))
        completion = site.client.completions.create(model="tiny", prompt="x", max_tokens=99)
        assert (await completion).choices[0].text == ANSWER
        assert (await site.http.get("/health")).status_code == 200
        refusal = await chat
        assert refusal.status_code == 400, refusal.text
        # The process that was ended has been replaced.
        tokenized = await site.http.post("/tokenize", json={"prompt": "x"}, timeout=60)
        assert tokenized.json()["count"] == 2


async def test_preparers_and_the_event_loop_prepare_alike(served_model: ServedModel, preparers: Preparers) -> None:
    here, there = Preparation(served_model), Preparation(served_model, preparers)
    prompts = ["Größe", "x" * 200]
    completion = body(prompt=prompts, n=2, stop=["a"], echo=True, logit_bias={"5": 1}, user="x" * SHORT_BODY_BYTES)
    assert await there.completion(completion, 256) == await here.completion(completion, 256)
    chat = body(messages=MESSAGES, max_tokens=3, stream=True, stream_options={"include_usage": True})
    assert await there.chat(chat, 256) == await here.chat(chat, 256)
    tokens = body(prompt="Größe", return_token_strs=True)
    assert await there.tokenize(tokens, None) == await here.tokenize(tokens, None)
    assert await there.detokenize(body(tokens=[65, 66]), 256) == b'{"prompt":"AB"}'


@pytest.mark.parametrize(
    ("asked", "words", "param"),
    [
        ({"prompt": "x" * 20_000}, "'prompt' has 20000 bytes.*256 tokens of at most 5 bytes, 1280 bytes", "prompt"),
        ({"prompt": ["a", "é" * 20_000]}, "'prompt' has 40000 bytes", "prompt"),
        ({"prompt": [1] * 20_000}, "maximum context length is 256 tokens.*has 20000 tokens", "prompt"),
        ({"prompt": "x", "stop": ["a" * 1001]}, r"'stop\[0\]': expected str of length <= 1000", "stop"),
        ({"prompt": ["x"] * 200, "n": 6}, "200 prompts of 6 choices are 1200 sequences, more than 1024", "n"),
        ({"prompt": [[1] * 250] * 10, "n": 64, "echo": True, "logprobs": 20}, "are 3360000 probabilities", "logprobs"),
        ({"messages": [MESSAGES[0] | {"content": "x" * 20_000}]}, "'messages' has 200.. bytes", "messages"),
        ({"messages": MESSAGES * 4097}, "'messages': expected array of length <= 4096", "messages"),
    ],
)
async def test_bounds_come_before_work(
    serve: Serve, preparers: Preparers, asked: dict[str, Any], words: str, param: str
) -> None:
    site = await serve(preparers=preparers)
    endpoint = "/chat/completions" if "messages" in asked else "/completions"
    with pytest.raises(openai.BadRequestError, match=words) as caught:
        await site.client.post(endpoint, body=asked, cast_to=object)
    assert caught.value.param == param
    assert site.router.requests == []


async def test_tokens_and_texts_are_bounded_where_they_are_only_looked_at(serve: Serve, preparers: Preparers) -> None:
    site = await serve(preparers=preparers)
    for path, asked, words in (
        ("/tokenize", {"prompt": "x" * 20_000}, "20000 bytes"),
        ("/tokenize", {"messages": [{"role": "user", "content": "x" * 20_000}]}, "'messages' has 200"),
        ("/detokenize", {"tokens": [1] * 20_000}, "20000 tokens, but this model's maximum context length is 256"),
    ):
        refused = await site.http.post(path, json=asked)
        assert refused.status_code == 400
        assert words in refused.json()["error"]["message"]


async def test_a_preparer_that_is_killed_is_replaced(served_model: ServedModel) -> None:
    with preparing(served_model, "{{ messages[0].content }}") as preparers:
        chat = body(messages=MESSAGES)
        await preparers.run(Task.CHAT, chat, MAX_MODEL_LEN)
        pids = preparers.pids
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        await preparers.run(Task.CHAT, chat, MAX_MODEL_LEN)
        await preparers.run(Task.CHAT, chat, MAX_MODEL_LEN)


async def test_one_that_dies_at_work_fails_its_request_alone(served_model: ServedModel) -> None:
    with preparing(served_model, BOMBS["nested loops"], count=1, cpu_s=60.0) as preparers:
        (pid,) = preparers.pids
        under_way = asyncio.create_task(preparers.run(Task.CHAT, body(messages=MESSAGES), MAX_MODEL_LEN))
        while preparers.pids:
            await asyncio.sleep(0)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(UnavailableError, match="the process that prepared this request ended"):
            await under_way
        assert await preparers.run(Task.DETOKENIZE, body(tokens=[65]), MAX_MODEL_LEN) == b'{"prompt":"A"}'


async def test_a_request_that_is_given_up_does_not_leave_its_answer_to_the_next(served_model: ServedModel) -> None:
    with preparing(served_model, BOMBS["nested loops"], count=1, cpu_s=60.0) as preparers:
        under_way = asyncio.create_task(preparers.run(Task.CHAT, body(messages=MESSAGES), MAX_MODEL_LEN))
        while preparers.pids:
            await asyncio.sleep(0)
        under_way.cancel()
        assert await preparers.run(Task.DETOKENIZE, body(tokens=[65]), MAX_MODEL_LEN) == b'{"prompt":"A"}'


async def test_waiting_is_bounded_in_time_and_bytes(served_model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAIT_S", 0.05)
    monkeypatch.setattr(module, "MAX_WAITING_BYTES", 1000)
    with preparing(served_model, BOMBS["nested loops"], count=1, cpu_s=1.0) as preparers:
        under_way = asyncio.create_task(preparers.run(Task.CHAT, body(messages=MESSAGES), MAX_MODEL_LEN))
        while preparers.pids:
            await asyncio.sleep(0)
        with pytest.raises(OverloadedError):
            await preparers.run(Task.TOKENIZE, body(prompt="x" * 1000), MAX_MODEL_LEN)
        with pytest.raises(UnavailableError, match="other requests"):
            await preparers.run(Task.TOKENIZE, body(prompt="x"), MAX_MODEL_LEN)
        with pytest.raises(InvalidRequestError, match="the chat template"):
            await under_way


async def test_memory_goes_back_after_a_large_body(
    served_model: ServedModel, preparers: Preparers, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_back = asyncio.Event()
    monkeypatch.setattr(module, "GIVE_BACK_AFTER_S", 0.0)
    monkeypatch.setattr(module, "give_back", given_back.set)
    with pytest.raises(InvalidRequestError, match="2000000 bytes"):
        await Preparation(served_model, preparers).tokenize(body(prompt="x" * 2_000_000), MAX_MODEL_LEN)
    async with asyncio.timeout(20):
        await given_back.wait()


async def test_long_answers_are_written_aside(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disagg.serve.api.generation.MANY_LOGPROBS", 0)
    aside = []
    to_thread = asyncio.to_thread
    monkeypatch.setattr(asyncio, "to_thread", lambda work: aside.append(work) or to_thread(work))
    site = await serve()
    asked = {"model": "tiny", "prompt": "ab", "echo": True, "logprobs": 2, "max_tokens": 3}
    whole = await site.client.completions.create(**asked)
    assert whole.choices[0].logprobs.tokens == ["<bos>", "a", "b", *ANSWER[:3]]
    pieces = [chunk async for chunk in await site.client.completions.create(**asked, stream=True)]
    assert "".join(chunk.choices[0].text for chunk in pieces) == whole.choices[0].text
    assert len(aside) >= 2


def test_a_server_that_goes_without_reading_an_answer_ends_its_preparer_in_silence(served_model: ServedModel) -> None:
    ours, servers = socket.socketpair()
    with ours, ThreadPoolExecutor() as threads:
        ended = threads.submit(prepare_all, ours, served_model, 1.0)
        assert select.select([servers], [], [], 30)[0], "no greeting came"
        servers.close()  # with the greeting unread, the preparer sees a reset
        assert ended.result(timeout=30) is None
