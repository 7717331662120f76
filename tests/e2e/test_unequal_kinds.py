"""Prefill and decode that differ in kernels, element type, block size and weights are one deployment: KV blocks are
converted.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server_process import ServerProcess, completion, serving

COMMON = (
    *("--dtype", "float32", "--max-model-len", "512", "--kv-memory", "128MiB", "--threads", "1"),
    *("--max-batch-tokens", "64"),
)
PROMPT = "Once upon a time, in a village by the sea, there lived a"
GREEDY = {"max_tokens": 24, "temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def alone() -> Iterator[ServerProcess]:
    """One instance, whose answers are those to give."""
    with serving("--colocated", "1", *COMMON) as server:
        yield server


def placement(folder: Path, prefill: str, decode: str) -> str:
    """A file that places one instance of each phase, of these kinds."""
    path = folder / "placement.yaml"
    path.write_text(f"groups:\n  - {{role: prefill, count: 1, {prefill}}}\n  - {{role: decode, count: 1, {decode}}}\n")
    return str(path)


def answer(server: ServerProcess) -> str:
    """The answer to the prompt, whose KV blocks were handed over in one form and used in another."""
    found = completion(server, PROMPT, **GREEDY)
    assert found.usage is not None
    assert found.usage.completion_tokens == GREEDY["max_tokens"]
    return str(found.choices[0].text)


def check_converted(server: ServerProcess) -> None:
    assert server.metric("disagg:hand_over_bytes_total") > 0, server.text
    assert server.metric("disagg:hand_over_failures_total") == 0, server.text
    assert "converted from" in server.text


@pytest.mark.slow
def test_other_kernels_give_the_same_answer(alone: ServerProcess, tmp_path: Path) -> None:
    """In float32, of which another order of the elements loses nothing."""
    file = placement(tmp_path, "kernels: torch", "kernels: native")
    with serving("--placement", file, *COMMON) as server:
        assert answer(server) == answer(alone)
        check_converted(server)


@pytest.mark.parametrize(
    ("prefill", "decode", "kv_link"), [(16, 32, "shm"), pytest.param(32, 16, "tcp", marks=pytest.mark.slow)]
)
def test_blocks_of_another_size_give_the_same_answers_and_keep_their_prefixes(
    alone: ServerProcess, prefill: int, decode: int, kv_link: str, tmp_path: Path
) -> None:
    """Of a prompt of several steps, read part by part, and of the next turn, whose beginning decode has kept."""
    long, turn = PROMPT * 20, {"max_tokens": 20, "temperature": 0.0, "ignore_eos": True, "return_token_ids": True}

    def turns(server: ServerProcess) -> tuple[Any, Any]:
        first = completion(server, long, **turn)
        (choice,) = first.choices
        return first, completion(server, [*choice.prompt_token_ids, *choice.token_ids], **turn)

    file = placement(tmp_path, f"block_size: {prefill}", f"block_size: {decode}")
    with serving("--placement", file, *COMMON, "--kv-link", kv_link) as server:
        found = turns(server)
        assert [one.choices[0].text for one in found] == [one.choices[0].text for one in turns(alone)]
        check_converted(server)
        assert f"blocks of {prefill} tokens to blocks of {decode}" in server.text
        num_known = found[0].usage.total_tokens - 1
        assert found[1].usage.prompt_tokens_details.cached_tokens >= (num_known // 16 - 4) * 16


def test_other_types_and_weights_begin_the_same_answer(tmp_path: Path) -> None:
    """Prefill in bfloat16, decode in float32 with weights of a byte, over TCP."""
    file = placement(tmp_path, "dtype: bfloat16", "quantization: int8")
    with serving("--placement", file, *COMMON, "--kv-link", "tcp") as server:
        assert answer(server).startswith(" wise")
        check_converted(server)


def test_coded_blocks_of_another_type_begin_the_same_answer(tmp_path: Path) -> None:
    file = placement(tmp_path, "dtype: float16", "dtype: bfloat16")
    with serving("--placement", file, *COMMON, "--kv-link", "tcp", "--kv-transfer-dtype", "int8") as server:
        assert answer(server).startswith(" wise")
        check_converted(server)
        assert server.metric("disagg:kv_link", link="tcp int8") == 1
