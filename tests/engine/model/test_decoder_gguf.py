"""A GGUF file computes what the Hugging Face folder that it was converted from computes."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.numpy import load_file
from step_runner import StepRunner

from disagg.base.config import DType
from disagg.base.errors import ConfigurationError
from disagg.cache.layout import KvFormat
from disagg.engine.kernels.torch_backend import TorchBackend
from disagg.engine.model.decoder import Decoder
from disagg.engine.model.rope import inverse_frequencies
from disagg.engine.model.weights import load_weights
from disagg.models.config import LinearRope, Llama3Rope, LongRope, ModelConfig
from disagg.models.locate import load_config, locate_model
from disagg.models.shape import NormPlacement

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
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


def gguf_name(name: str, placement: NormPlacement) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight"""
    part, _, kind = name.rpartition(".")
    if not part.startswith("model.layers."):
        return f"{GGUF_NAMES[part]}.{kind}"
    layer, _, inner = part.removeprefix("model.layers.").partition(".")
    is_output_norm = inner == "post_attention_layernorm" and placement is not NormPlacement.BEFORE
    return f"blk.{layer}.{'post_attention_norm' if is_output_norm else GGUF_NAMES[inner]}.{kind}"


def permuted(values: npt.NDArray[Any], num_heads: int) -> npt.NDArray[Any]:
    """``LlamaModel.permute`` of llama.cpp's converter."""
    half = values.shape[0] // num_heads // 2
    return values.reshape(num_heads, 2, half, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def convert(folder: Path, path: Path, architecture: str, surplus: str | None = None) -> Path:
    """What llama.cpp's ``convert_hf_to_gguf.py`` writes, in float32, and a tensor called ``surplus``."""
    config = load_config(locate_model(str(folder)))
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    add_architecture(writer, architecture, config)
    if isinstance(config.rope_scaling, Llama3Rope):
        writer.add_tensor("rope_freqs.weight", rope_divisors(config))
    if surplus is not None:
        writer.add_tensor(surplus, np.ones(4, np.float32))
    for name, values in load_file(folder / "model.safetensors").items():
        if architecture in ("llama", "granite") and ".q_proj." in name:
            values = permuted(values, config.num_heads)
        if architecture in ("llama", "granite") and ".k_proj." in name:
            values = permuted(values, config.num_kv_heads)
        if config.norms_stored_less_one and name.endswith("norm.weight"):
            values = values + 1
        writer.add_tensor(gguf_name(name, config.norm_placement), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_architecture(writer: gguf.GGUFWriter, architecture: str, config: ModelConfig) -> None:
    """What the converter writes for one architecture."""
    if architecture in ("gemma2", "gemma3"):
        writer.add_sliding_window(next(window for window in config.sliding_windows if window is not None))
    if config.attention_softcap is not None:
        writer.add_attn_logit_softcapping(config.attention_softcap)
    if config.logit_softcap is not None:
        writer.add_final_logit_softcapping(config.logit_softcap)
    if architecture == "granite":
        writer.add_attention_scale(config.attention_scale)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(1 / config.logit_multiplier)
    if isinstance(config.rope_scaling, LinearRope):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling.factor)
    if isinstance(config.rope_scaling, LongRope):
        writer.add_rope_dimension_count(config.rotary_dim)
        writer.add_rope_scaling_orig_ctx_len(config.rope_scaling.original_max_position_embeddings)
        writer.add_rope_scaling_attn_factors(config.rope_scaling.attention_factor)
        for length, divisors in (
            ("long", config.rope_scaling.long_divisors),
            (
                "short",
                config.rope_scaling.short_divisors,
            ),
        ):
            writer.add_tensor(f"rope_factors_{length}.weight", np.asarray(divisors, np.float32))


def rope_divisors(config: ModelConfig) -> npt.NDArray[np.float32]:
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
    return (1.0 / config.rope_theta**exponents / inverse_frequencies(config).numpy()).astype(np.float32)


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


def test_a_tensor_that_the_decoder_has_no_use_for_is_named(tiny_model: Any, tmp_path: Path) -> None:
    converted = convert(tiny_model("llama"), tmp_path / "model.gguf", "llama", surplus="blk.0.attn_sinks.weight")

    with pytest.raises(ConfigurationError, match=r"'blk\.0\.attn_sinks\.weight'.*does not use"):
        logits_of(converted, [1, 2, 3])


def test_tables_of_the_rotary_embedding_are_no_weights(tiny_model: Any, tmp_path: Path) -> None:
    converted = convert(tiny_model("llama"), tmp_path / "model.gguf", "llama", surplus="blk.0.attn_rot_embd.weight")

    assert logits_of(converted, [1, 2, 3]).shape == (3, 320)
