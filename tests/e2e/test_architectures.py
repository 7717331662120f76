"""Every architecture, on one prefill and one decode instance, gives the tokens that transformers generates.

So do some that transformers' code computes."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from server_process import completion, serving

SETTINGS = ("--dtype", "float32", "--max-model-len", "160", "--kv-memory", "64MiB", "--max-batch-tokens", "48")
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 2.0, 4.0, 6.0, 7.0, 8.0],
}
MODELS: dict[str, dict[str, Any]] = {
    "gemma3_text": {"num_hidden_layers": 7, "sliding_window": 24, "query_pre_attn_scalar": 16},
    "phi3": {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 160},
    "gemma2": {"sliding_window": 24, "query_pre_attn_scalar": 16},
    "olmo2": {},
    "gpt_neox": {"num_key_value_heads": None, "head_dim": None},
    "starcoder2": {"sliding_window": 24, "head_dim": None},
    "cohere": {},
    "granite": {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 6.0},
}
QUICK = ("gemma3_text", "gpt_neox")
"""One of our own decoder, and one that transformers' code computes."""
NEW = 20


def prompts() -> list[list[int]]:
    """Shorter than a window and than a block, and longer than several of both and than a step."""
    return [
        torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        for length in (5, 130)
    ]


def generated(folder: Path, prompt: list[int]) -> list[int]:
    """Return transformers' greedy continuation."""
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        tokens = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
        )
    continuation: list[int] = tokens[0, len(prompt) :].tolist()
    return continuation


@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in MODELS]
)
def test_prefill_and_decode_give_the_tokens_of_transformers(model_type: str, tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model(model_type, **MODELS[model_type])
    with serving("--prefill", "1", "--decode", "1", *SETTINGS, str(folder)) as server:
        for prompt in prompts():
            answer = completion(
                server, prompt, temperature=0.0, max_tokens=NEW, min_tokens=NEW, return_token_ids=True
            ).choices[0]
            assert answer.token_ids == generated(folder, prompt)
        assert server.metric("disagg:hand_over_bytes_total") > 0, "no KV block was handed over"
