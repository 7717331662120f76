"""GGUF files of tiny models, written as llama.cpp's converter and quantiser write them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType
from safetensors.numpy import load_file

from disagg.engine.model.rope import inverse_frequencies
from disagg.models.config import Architecture, LinearRope, Llama3Rope, LongRope, ModelConfig
from disagg.models.locate import load_config, locate_model
from disagg.models.shape import NormPlacement

KindOf = Callable[[str, npt.NDArray[Any]], GGMLQuantizationType]
"""From a tensor's name and values: how it is stored."""

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
    "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}
_EXPERT = re.compile(r"(?P<layer>model\.layers\.\d+)\.\w+\.experts\.(?P<number>\d+)\.(?P<part>\w+)\.weight")
_EXPERT_PARTS = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


def gguf_name(name: str, placement: NormPlacement) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight"""
    part, _, kind = name.rpartition(".")
    if not part.startswith("model.layers."):
        return f"{GGUF_NAMES[part]}.{kind}"
    layer, _, inner = part.removeprefix("model.layers.").partition(".")
    is_output_norm = inner == "post_attention_layernorm" and placement is not NormPlacement.BEFORE
    if inner.startswith("ffn_"):
        return f"blk.{layer}.{inner}.{kind}"
    return f"blk.{layer}.{'post_attention_norm' if is_output_norm else GGUF_NAMES[inner]}.{kind}"


def with_merged_experts(tensors: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """One tensor for all experts of a layer, as the converter makes it."""
    merged, experts = {}, dict[str, dict[int, npt.NDArray[Any]]]()
    for name, values in tensors.items():
        match = _EXPERT.fullmatch(name)
        if match is None:
            merged[name] = values
        else:
            whole = f"{match['layer']}.ffn_{_EXPERT_PARTS[match['part']]}_exps.weight"
            experts.setdefault(whole, {})[int(match["number"])] = values
    return merged | {name: np.stack([parts[n] for n in range(len(parts))]) for name, parts in experts.items()}


def permuted(values: npt.NDArray[Any], num_heads: int) -> npt.NDArray[Any]:
    """``LlamaModel.permute`` of llama.cpp's converter."""
    half = values.shape[0] // num_heads // 2
    return values.reshape(num_heads, 2, half, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def in_float32(name: str, values: npt.NDArray[Any]) -> GGMLQuantizationType:
    return GGMLQuantizationType.F32


def convert(
    folder: Path, path: Path, architecture: str, surplus: str | None = None, kind_of: KindOf = in_float32
) -> Path:
    """What llama.cpp's ``convert_hf_to_gguf.py`` writes, quantised, and a tensor called ``surplus``."""
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
    for name, values in with_merged_experts(load_file(folder / "model.safetensors")).items():
        if name.endswith("shared_expert_gate.weight"):
            values = values.squeeze()
        if architecture in ("llama", "granite") and ".q_proj." in name:
            values = permuted(values, config.num_heads)
        if architecture in ("llama", "granite") and ".k_proj." in name:
            values = permuted(values, config.num_kv_heads)
        if config.norms_stored_less_one and name.endswith("norm.weight"):
            values = values + 1
        kind = kind_of(name, values)
        data = gguf.quants.quantize(np.ascontiguousarray(values), kind)
        writer.add_tensor(gguf_name(name, config.norm_placement), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_experts(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    experts = next(filter(None, config.layer_experts))
    writer.add_expert_count(experts.num_experts)
    writer.add_expert_used_count(experts.num_per_token)
    if config.architecture in (Architecture.QWEN2_MOE, Architecture.QWEN3_MOE):
        writer.add_expert_feed_forward_length(experts.intermediate_size)
    if experts.shared_intermediate_size:
        writer.add_expert_shared_feed_forward_length(experts.shared_intermediate_size)


def add_architecture(writer: gguf.GGUFWriter, architecture: str, config: ModelConfig) -> None:
    """What the converter writes for one architecture."""
    if config.layer_experts:
        add_experts(writer, config)
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
