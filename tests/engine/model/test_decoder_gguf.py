"""A GGUF file computes what the Hugging Face folder that it was converted from computes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_converter import convert
from step_runner import StepRunner
from transformers_logits import reference_logits

from disagg.base.config import DType
from disagg.base.errors import ConfigurationError
from disagg.cache.layout import KvFormat
from disagg.engine.kernels.torch_backend import TorchBackend
from disagg.engine.model.decoder import Decoder
from disagg.engine.model.weights import load_weights
from disagg.models.locate import load_config, locate_model

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 2.0, 4.0, 6.0, 7.0, 8.0],
}
GEMMA3_SCALED = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


def logits_of(model: Path, token_ids: list[int]) -> torch.Tensor:
    files = locate_model(str(model))
    config = load_config(files)
    backend = TorchBackend(KvFormat.INTERLEAVED)
    decoder = Decoder(config, load_weights(files, config, backend, dtype=DType.FLOAT32), backend)
    return StepRunner(decoder).step({0: token_ids}, all_rows=True)


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        ("llama", {"rope_parameters": LLAMA3_ROPE}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 32}),
        ("gemma2", {"sliding_window": 24, "query_pre_attn_scalar": 16}),
        ("gemma3", {"sliding_window": 24, "query_pre_attn_scalar": 16, "num_hidden_layers": 7}),
        ("gemma3", {"query_pre_attn_scalar": 16, "rope_parameters": GEMMA3_SCALED}),
        ("phi3", {"sliding_window": None}),
        ("phi3", {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 64}),
        ("olmo2", {}),
        ("granite", {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 6.0}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "plain",
)
def test_same_logits(tiny_model: Any, tmp_path: Path, architecture: str, settings: dict[str, Any]) -> None:
    folder = tiny_model("gemma3_text" if architecture == "gemma3" else architecture, **settings)
    token_ids = torch.randint(0, 320, (150,), generator=torch.Generator().manual_seed(3)).tolist()

    converted = convert(folder, tmp_path / "model.gguf", architecture)

    torch.testing.assert_close(logits_of(converted, token_ids), logits_of(folder, token_ids), atol=1e-4, rtol=1e-4)


EIGHT = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}


@pytest.mark.parametrize(
    ("model_type", "architecture", "settings"),
    [
        ("mixtral", "llama", {"num_local_experts": 6, "num_experts_per_tok": 2}),
        ("qwen2_moe", "qwen2moe", EIGHT | {"shared_expert_intermediate_size": 96}),
        ("qwen3_moe", "qwen3moe", EIGHT | {"norm_topk_prob": True}),
        ("olmoe", "olmoe", {"num_experts": 6, "num_experts_per_tok": 3}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mixtures_of_experts_give_the_logits_of_transformers(
    tiny_model: Any, tmp_path: Path, model_type: str, architecture: str, settings: dict[str, Any]
) -> None:
    folder = tiny_model(model_type, **settings)
    token_ids = torch.randint(0, 320, (60,), generator=torch.Generator().manual_seed(3)).tolist()
    converted = convert(folder, tmp_path / "model.gguf", architecture)
    assert (
        load_config(locate_model(str(converted))).layer_experts == load_config(locate_model(str(folder))).layer_experts
    )
    expected = reference_logits(folder, token_ids)
    torch.testing.assert_close(logits_of(converted, token_ids), expected, atol=1e-4, rtol=1e-4)


def test_a_tensor_that_the_decoder_has_no_use_for_is_named(tiny_model: Any, tmp_path: Path) -> None:
    converted = convert(tiny_model("llama"), tmp_path / "model.gguf", "llama", surplus="blk.0.attn_sinks.weight")

    with pytest.raises(ConfigurationError, match=r"'blk\.0\.attn_sinks\.weight'.*does not use"):
        logits_of(converted, [1, 2, 3])


def test_tables_of_the_rotary_embedding_are_no_weights(tiny_model: Any, tmp_path: Path) -> None:
    converted = convert(tiny_model("llama"), tmp_path / "model.gguf", "llama", surplus="blk.0.attn_rot_embd.weight")

    assert logits_of(converted, [1, 2, 3]).shape == (3, 320)
