"""Instances are killed under eight streams, and every answer is the one that would have come, token for token."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
from server_process import ServerProcess, completion, serving
from test_lifecycle import wait_for

EXACT = ("--dtype", "float32", "--max-model-len", "512", "--kv-memory", "256MiB")
NUM_STREAMS = 8
NUM_TOKENS = 64


def fields(number: int) -> dict[str, Any]:
    """Every second one samples, with all that depends on position or earlier tokens; half of them by a grammar."""
    sampled = {"temperature": 0.9, "top_p": 0.95, "presence_penalty": 0.6, "frequency_penalty": 0.3}
    return {
        "max_tokens": NUM_TOKENS,
        "min_tokens": NUM_TOKENS,
        "seed": 100 + number,
        "logprobs": 2,
        "return_token_ids": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **(sampled if number % 2 else {"temperature": 0.0, "repetition_penalty": 1.2}),
        **({"guided_regex": r"( [a-z]{2,9}\.?)*"} if number % 4 == 3 else {}),
    }


def answer(server: ServerProcess, number: int, under_way: Barrier | None = None) -> tuple[list[int], list[float], Any]:
    """Return tokens, their log-probabilities and the usage; wait for all others and the kill after 16 tokens."""
    tokens: list[int] = []
    logprobs: list[float] = []
    usage = None
    for chunk in completion(
        server, f"Story number {number}: once upon a time " + "there was a house by the sea, " * 8, **fields(number)
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            tokens += getattr(choice, "token_ids", None) or []
            logprobs += choice.logprobs.token_logprobs if choice.logprobs else []
        if under_way is not None and len(tokens) >= 16:
            under_way.wait(60.0)
            under_way = None
    return tokens, logprobs, usage


@pytest.mark.parametrize("role", ["decode", pytest.param("prefill", marks=pytest.mark.slow)])
def test_every_answer_is_the_undisturbed_one(role: str) -> None:
    with serving(*EXACT) as server, ThreadPoolExecutor(NUM_STREAMS) as pool:
        expected = list(pool.map(lambda number: answer(server, number), range(NUM_STREAMS)))
        under_way = Barrier(NUM_STREAMS + 1) if role == "decode" else None
        disturbed = [pool.submit(answer, server, number, under_way) for number in range(NUM_STREAMS)]
        if under_way is not None:
            under_way.wait(60.0)
        else:
            wait_for(lambda: server.metric("vllm:num_requests_running", role=role) > 0, "prefills under way")
        (victim,) = [one["pid"] for one in server.get("/status").json()["instances"] if one["role"] == role]
        os.kill(victim, signal.SIGKILL)
        for number, (tokens, logprobs, usage) in enumerate(expected):
            got_tokens, got_logprobs, got_usage = disturbed[number].result(timeout=120)
            assert got_tokens == tokens
            assert len(tokens) == NUM_TOKENS
            assert got_logprobs == pytest.approx(logprobs, abs=1e-3)
            assert (got_usage.prompt_tokens, got_usage.completion_tokens) == (usage.prompt_tokens, NUM_TOKENS)
        assert server.metric("disagg:sequences_resumed_total") > 0
        assert server.metric("disagg:resume_pause_seconds_count") > 0
