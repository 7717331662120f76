"""Prefill here and decode there gives, token for token, what one instance gives (float32, CPU)."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
from server_process import ServerProcess, completion, serving

BLOCK = 16
CHUNK = 48
MAX_LEN = 200
SETTINGS = (
    "--dtype", "float32", "--max-model-len", str(MAX_LEN), "--block-size", str(BLOCK),
    "--max-batch-tokens", str(CHUNK), "--kv-memory", "512MiB",
)  # fmt: skip
PLACEMENTS = {
    "1x1": ("--prefill", "1", "--decode", "1"),
    "2x1": ("--prefill", "2", "--decode", "1"),
    "1x2": ("--prefill", "1", "--decode", "2"),
}
NEW = 12


@dataclass(frozen=True)
class Case:
    """One request and how to compare its answer."""

    name: str
    prompt: list[int] | str
    fields: dict[str, Any]


def tokens(length: int, salt: int) -> list[int]:
    """A prompt of exact length: ordinary tokens of the vocabulary, another for each salt."""
    return [1000 + (salt * 7919 + position * 104_729) % 40_000 for position in range(length)]


def cases() -> list[Case]:
    lengths = {
        "one": 1,
        "block-1": BLOCK - 1,
        "block": BLOCK,
        "block+1": BLOCK + 1,
        "chunks": 3 * CHUNK + 5,
        "maximum": MAX_LEN - NEW,
    }
    greedy = {"temperature": 0.0, "max_tokens": NEW, "ignore_eos": True}
    seeded = {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "seed": 11, "max_tokens": NEW, "ignore_eos": True}
    story = "Once upon a time there was a"
    return [
        *(Case(f"greedy-{name}", tokens(length, 1), greedy) for name, length in lengths.items()),
        *(Case(f"seeded-{name}", tokens(length, 2), seeded) for name, length in lengths.items()),
        Case("n", story, {**seeded, "n": 3}),
        Case("stop", story, {**greedy, "max_tokens": 40, "stop": ["ived in", "zebra"]}),
        Case("logprobs", story, {**greedy, "logprobs": 5}),
        Case("echo", story, {**greedy, "logprobs": 2, "echo": True}),
        Case("grammar", story, {**seeded, "ignore_eos": False, "max_tokens": 40, "guided_regex": "( [a-z]{2,6})*[.]"}),
        Case("words", story, {**greedy, "bad_words": ["little", "time"], "allowed_token_ids": list(range(200, 9000))}),
        Case("penalties", story, {**seeded, "repetition_penalty": 1.2, "presence_penalty": 0.5}),
    ]


@dataclass(frozen=True)
class Answer:
    """What must be equal: texts, reasons and tokens exactly, log probabilities to 1e-4."""

    exact: list[Any]
    logprobs: list[float]


def answer(server: ServerProcess, case: Case) -> Answer:
    response = completion(server, case.prompt, **case.fields)
    assert response.usage is not None
    exact: list[Any] = [response.usage.completion_tokens]
    logprobs: list[float] = []
    for choice in sorted(response.choices, key=lambda one: one.index):
        exact += [choice.text, choice.finish_reason]
        if choice.logprobs is not None:
            exact.append(choice.logprobs.tokens)
            logprobs += [p for p in choice.logprobs.token_logprobs if p is not None]
            for top in choice.logprobs.top_logprobs:
                exact.append(sorted(top or {}))
                logprobs += [p for _, p in sorted((top or {}).items())]
    return Answer(exact, logprobs)


def answers(server: ServerProcess, concurrency: int) -> dict[str, Answer]:
    with ThreadPoolExecutor(concurrency) as pool:
        return dict(zip((c.name for c in cases()), pool.map(lambda c: answer(server, c), cases()), strict=True))


@pytest.fixture(scope="module")
def colocated_answers() -> dict[str, Answer]:
    with serving("--colocated", "1", *SETTINGS) as server:
        return answers(server, concurrency=1)


@pytest.mark.parametrize(
    "placement", [pytest.param("1x1", marks=pytest.mark.slow), pytest.param("1x2", marks=pytest.mark.slow), "2x1"]
)
def test_prefill_and_decode_on_two_instances_equal_one(placement: str, colocated_answers: dict[str, Answer]) -> None:
    with serving(*PLACEMENTS[placement], *SETTINGS) as server:
        for concurrency in (1, 32):
            found = answers(server, concurrency)
            for name, expected in colocated_answers.items():
                assert found[name].exact == expected.exact, f"{name} at concurrency {concurrency}"
                assert found[name].logprobs == pytest.approx(expected.logprobs, abs=1e-4), name
        assert server.metric("disagg:hand_over_bytes_total") > 0, "no KV block was handed over"
        assert server.metric("disagg:hand_over_failures_total") == 0


def test_a_stop_string_that_spans_tokens_is_cut_out(colocated_answers: dict[str, Answer]) -> None:
    _, text, reason = colocated_answers["stop"].exact
    assert "ived in" not in text
    assert reason in ("stop", "length")
