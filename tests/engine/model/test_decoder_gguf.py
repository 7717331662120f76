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
from disagg.models.config import Llama3Rope, ModelConfig
from disagg.models.locate import load_config, locate_model

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


def gguf_name(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight"""
    part, _, kind = name.rpartition(".")
    if not part.startswith("model.layers."):
        return f"{GGUF_NAMES[part]}.{kind}"
    layer, _, inner = part.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{GGUF_NAMES[inner]}.{kind}"


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
    if isinstance(config.rope_scaling, Llama3Rope):
        writer.add_tensor("rope_freqs.weight", rope_divisors(config))
    if surplus is not None:
        writer.add_tensor(surplus, np.ones(4, np.float32))
    for name, values in load_file(folder / "model.safetensors").items():
        if architecture == "llama" and ".q_proj." in name:
            values = permuted(values, config.num_heads)
        if architecture == "llama" and ".k_proj." in name:
            values = permuted(values, config.num_kv_heads)
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


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
    ],
    ids=["llama", "llama-biases", "llama-3.1", "qwen2", "qwen3"],
)
def test_same_logits(tiny_model: Any, tmp_path: Path, architecture: str, settings: dict[str, Any]) -> None:
    folder = tiny_model(architecture, **settings)
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
