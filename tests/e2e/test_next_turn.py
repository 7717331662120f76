"""Later turns of conversations with the real model: from the other instance's pool, and from disk after a restart."""

from pathlib import Path
from typing import Any

import pytest
from server_process import ServerProcess, completion, serving

EXACT = ("--dtype", "float32", "--max-model-len", "1024", "--kv-memory", "256MiB", "--block-size", "32")
QUESTION = "Here is a long story. " + "There was a house by the sea, and in it lived a cat. " * 12


def answer(server: ServerProcess, prompt: list[int] | str, num_tokens: int) -> Any:
    fields = {"max_tokens": num_tokens, "min_tokens": num_tokens, "temperature": 0.0, "return_token_ids": True}
    return completion(server, prompt, **fields)


@pytest.mark.slow
def test_the_next_turn_is_pulled_and_after_a_restart_it_is_read_from_disk(tmp_path: Path) -> None:
    disk = ("--kv-disk", f"{tmp_path},1GiB")
    with serving(*EXACT, *disk, "--no-append-turns") as server:
        first = answer(server, QUESTION, 200)
        (choice,) = first.choices
        conversation = [*choice.prompt_token_ids, *choice.token_ids]
        second = answer(server, conversation, 24)
        # Prefill had the question, decode the answer too, but for the KV of its last token.
        num_held = (len(conversation) - 1) // 32 * 32
        assert second.usage.prompt_tokens_details.cached_tokens == num_held
        assert server.metric("disagg:prefix_cache_pulled_total", role="prefill") >= 160
        server.end()
    with serving(*EXACT, *disk) as server:
        again = answer(server, conversation, 24)
        assert again.usage.prompt_tokens_details.cached_tokens >= num_held - 32
        assert server.metric("disagg:prefix_cache_loaded_total", role="decode") >= num_held - 32
        assert again.choices[0].token_ids == second.choices[0].token_ids
