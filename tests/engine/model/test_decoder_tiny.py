"""The decoder against transformers, on tiny random models of every supported architecture, in float32."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from step_runner import StepRunner, greedy
from transformers_logits import load_decoder, reference_logits

from disagg.base.config import DType
from disagg.engine.kernels.native_backend import native_unavailable_reason
from disagg.engine.kernels.select import select_backend

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG_ROPE = {
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 2.0, 4.0, 6.0, 7.0, 8.0],
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2": ("llama", {"num_key_value_heads": 4}),
    "llama-3": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}}),
    "llama-3.1": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-3.2-tied": ("llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama-linear-rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}},
    ),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("llama", {"head_dim": 32}),
    "smollm2": (
        "llama",
        {"num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True, "hidden_size": 48},
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-sliding": ("mistral", {"sliding_window": 24}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2.5-untied": ("qwen2", {}),
    "qwen2.5-yarn": ("qwen2", {"rope_parameters": YARN_ROPE}),
    "qwen2-sliding-above": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3-biases": ("qwen3", {"attention_bias": True, "head_dim": 32}),
    "gemma2": ("gemma2", {"sliding_window": 24, "query_pre_attn_scalar": 32}),
    "gemma2-uncapped": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3": ("gemma3_text", {"num_hidden_layers": 7, "sliding_window": 24, "query_pre_attn_scalar": 32}),
    "gemma3-scaled": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window": 24,
            "final_logit_softcapping": 20.0,
        },
    ),
    "phi3": ("phi3", {}),
    "phi3-sliding": ("phi3", {"sliding_window": 24}),
    "phi4-mini": (
        "phi3",
        {
            "rope_parameters": {"rope_type": "longrope", "partial_rotary_factor": 0.75, **LONG_ROPE},
            "original_max_position_embeddings": 64,
            "tie_word_embeddings": True,
        },
    ),
    "olmo2": ("olmo2", {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}}),
    "olmo2-one-kv-head": ("olmo2", {"num_key_value_heads": 1, "attention_bias": True}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.0625,
            "logits_scaling": 6.0,
            "tie_word_embeddings": True,
        },
    ),
    "sharded": ("llama", {"max_shard_size": "100KB"}),
}


@pytest.fixture(params=MODELS, scope="module")
def folder(request: pytest.FixtureRequest, tiny_model: Any) -> Path:
    model_type, settings = MODELS[request.param]
    path: Path = tiny_model(model_type, **settings)
    return path


def test_logits_of_a_prompt_are_those_of_transformers(folder: Path) -> None:
    token_ids = torch.randint(0, 320, (150,), generator=torch.Generator().manual_seed(1)).tolist()

    logits = StepRunner(load_decoder(folder)).step({0: token_ids}, all_rows=True)

    torch.testing.assert_close(logits, reference_logits(folder, token_ids), atol=1e-4, rtol=1e-4)


def test_chunks_decodes_and_other_sequences_change_nothing(folder: Path) -> None:
    """One sequence as two chunks and five decodes, in steps shared with another one."""
    token_ids = torch.randint(0, 320, (45,), generator=torch.Generator().manual_seed(2)).tolist()
    other = token_ids[::-1]
    # Within 64 tokens LongRoPE takes its short factors, as transformers does for a sequence that short.
    runner = StepRunner(load_decoder(folder, max_model_len=64), num_blocks=16)
    cuts = [0, 17, 40, 41, 42, 43, 44, 45]

    last_rows = [
        runner.step({0: other[start:end], 1: token_ids[start:end]})[1] for start, end in itertools.pairwise(cuts)
    ]

    expected = reference_logits(folder, token_ids)[[end - 1 for end in cuts[1:]]]
    torch.testing.assert_close(torch.stack(last_rows), expected, atol=1e-4, rtol=1e-4)


def test_a_step_that_wants_no_logits_still_writes_keys_and_values(tiny_model: Any) -> None:
    decoder = load_decoder(tiny_model("llama"))
    token_ids = list(range(40))
    whole, chunked = StepRunner(decoder), StepRunner(decoder)

    assert chunked.step({0: token_ids[:30]}, no_rows=True).shape == (0, 320)

    torch.testing.assert_close(chunked.step({0: token_ids[30:]}), whole.step({0: token_ids}), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend_name", ["native", "torch"])
def test_float16_differs_by_its_rounding(tiny_model: Any, backend_name: str) -> None:
    if backend_name == "native" and (reason := native_unavailable_reason(torch.device("cpu"), torch.float16)):
        pytest.skip(reason)
    backend = select_backend(torch.device("cpu"), torch.float16, backend_name)
    folder = tiny_model("llama", initializer_range=0.05)
    token_ids = torch.randint(0, 320, (40,), generator=torch.Generator().manual_seed(4)).tolist()
    runner = StepRunner(load_decoder(folder, dtype=DType.FLOAT16, backend=backend), dtype=torch.float16)

    logits = [runner.step({0: token_ids[:39]}), runner.step({0: token_ids[39:]})]

    expected = reference_logits(folder, token_ids)[-2:]
    torch.testing.assert_close(torch.cat(logits).float(), expected, atol=5e-3, rtol=5e-3)
    prompts = [[5, 6, 7], list(range(40, 57))]
    exact = greedy(load_decoder(folder), prompts, max_tokens=12)
    half = load_decoder(folder, dtype=DType.FLOAT16, backend=backend)
    assert greedy(half, prompts, max_tokens=12, dtype=torch.float16) == exact
