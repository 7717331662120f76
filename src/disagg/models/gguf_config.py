"""From a GGUF file's metadata to ``ModelConfig``; refuses what the decoder cannot compute, by name."""

import math
from typing import Final, TypeVar

import numpy as np

from disagg.base.errors import ConfigurationError, UnsupportedModelError
from disagg.models.config import Architecture, FactorsRope, LinearRope, ModelConfig, RopeScaling, YarnRope
from disagg.models.gguf_fields import check_keys, unsupported_key
from disagg.models.gguf_file import GgufFile
from disagg.models.hf_config import check_config
from disagg.models.hf_rope import yarn_magnitude

T = TypeVar("T", int, float, str)

_ARCHITECTURES: Final = {
    "llama": Architecture.LLAMA,
    "qwen2": Architecture.QWEN2,
    "qwen3": Architecture.QWEN3,
}
_SUPPORTED: Final = "'llama' (Llama, SmolLM2, Mistral), 'qwen2', 'qwen3'"
_ROPE_FACTORS: Final = "rope_freqs.weight"


def config_from_gguf(file: GgufFile) -> ModelConfig:
    """Return the configuration that the file's metadata describes.

    Raises UnsupportedModelError for a model that no code here can run, ConfigurationError for broken metadata.
    """
    name = _get(file, "general.architecture", str)
    if name not in _ARCHITECTURES:
        raise UnsupportedModelError(
            f"{file.path}: GGUF architecture {name!r} (key 'general.architecture') is not supported; "
            f"supported: {_SUPPORTED}"
        )
    check_keys(file, name)
    num_heads = _get(file, f"{name}.attention.head_count", int)
    hidden_size = _get(file, f"{name}.embedding_length", int)
    num_layers = _get(file, f"{name}.block_count", int)
    head_dim = _get(file, f"{name}.attention.key_length", int, hidden_size // max(num_heads, 1))
    rotated = _get(file, f"{name}.rope.dimension_count", int, head_dim)
    if rotated != head_dim:
        raise unsupported_key(file, f"{name}.rope.dimension_count", rotated, f"the whole head, {head_dim}")
    value_dim = _get(file, f"{name}.attention.value_length", int, head_dim)
    if value_dim != head_dim:
        raise unsupported_key(file, f"{name}.attention.value_length", value_dim, f"as long as keys, {head_dim}")
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    num_tokens = len(tokens) if isinstance(tokens, list) else None
    config = ModelConfig(
        architecture=_ARCHITECTURES[name],
        vocab_size=_get(file, f"{name}.vocab_size", int, num_tokens),
        hidden_size=hidden_size,
        intermediate_size=_get(file, f"{name}.feed_forward_length", int),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=_get(file, f"{name}.attention.head_count_kv", int, num_heads),
        head_dim=head_dim,
        rms_norm_eps=_get(file, f"{name}.attention.layer_norm_rms_epsilon", float),
        rope_theta=_positive(file, f"{name}.rope.freq_base", 10_000.0),
        rope_scaling=_rope_scaling(file, name, head_dim),
        max_position_embeddings=_get(file, f"{name}.context_length", int),
        sliding_windows=(None,) * num_layers,
        tie_word_embeddings="output.weight" not in file.tensors,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        attention_output_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        bos_token_id=_optional_id(file, "bos"),
        eos_token_ids=_eos_token_ids(file),
        stored_dtype=_commonest_format(file),
    )
    check_config(config, str(file.path))
    return config


def _get(file: GgufFile, key: str, kind: type[T], default: T | None = None) -> T:
    value = file.metadata.get(key, default)
    if value is None:
        raise ConfigurationError(f"{file.path}: metadata key {key!r} is missing; is it a language model's file?")
    if kind is float and isinstance(value, int):
        return kind(value)
    if (
        not isinstance(value, kind)
        or isinstance(value, bool)
        or (isinstance(value, float) and not math.isfinite(value))
    ):
        raise ConfigurationError(f"{file.path}: metadata key {key!r} should be {kind.__name__}, got {value!r}")
    return value


def _rope_scaling(file: GgufFile, name: str, head_dim: int) -> RopeScaling | None:
    """Return the scaling as llama.cpp reads it: a factor without a type is linear."""
    prefix = f"{name}.rope.scaling"
    factor = _get(file, f"{prefix}.factor", float, _get(file, f"{name}.rope.scale_linear", float, 0.0))
    kind = _get(file, f"{prefix}.type", str, "linear" if factor not in (0.0, 1.0) else "none")
    if kind not in ("none", "linear", "yarn"):
        raise unsupported_key(file, f"{prefix}.type", kind, "'none', 'linear', 'yarn', or rope_freqs.weight")
    if _ROPE_FACTORS in file.tensors:
        if kind != "none":
            raise unsupported_key(file, f"{prefix}.type", kind, f"'none' beside {_ROPE_FACTORS}")
        return FactorsRope(divisors=_rope_divisors(file, head_dim))
    if kind == "none":
        return None
    if factor <= 0:
        raise ConfigurationError(f"{file.path}: metadata key '{prefix}.factor' should be above 0, got {factor}")
    if kind == "linear":
        return LinearRope(factor=factor)
    return YarnRope(
        factor=factor,
        original_max_position_embeddings=_get(
            file, f"{prefix}.original_context_length", int, _get(file, f"{name}.context_length", int)
        ),
        attention_factor=yarn_magnitude(factor),
        beta_fast=_positive(file, f"{prefix}.yarn_beta_fast", 32.0),
        beta_slow=_positive(file, f"{prefix}.yarn_beta_slow", 1.0),
    )


def _rope_divisors(file: GgufFile, head_dim: int) -> tuple[float, ...]:
    divisors = file.read(_ROPE_FACTORS)
    if divisors.shape != (head_dim // 2,) or not (divisors > 0).all():
        raise ConfigurationError(
            f"{file.path}: tensor {_ROPE_FACTORS!r} should hold {head_dim // 2} numbers above 0, one for each pair of "
            f"a head; it is {list(divisors.shape)}"
        )
    return tuple(divisors.tolist())


def _positive(file: GgufFile, key: str, default: float) -> float:
    value = _get(file, key, float, default)
    if value <= 0:
        raise ConfigurationError(f"{file.path}: metadata key {key!r} should be above 0, got {value}")
    return value


def _optional_id(file: GgufFile, role: str) -> int | None:
    key = f"tokenizer.ggml.{role}_token_id"
    return _get(file, key, int) if key in file.metadata else None


def _eos_token_ids(file: GgufFile) -> tuple[int, ...]:
    """End of sequence, end of turn, end of message: generation stops at any of them."""
    ids = (_optional_id(file, role) for role in ("eos", "eot", "eom"))
    return tuple(dict.fromkeys(token_id for token_id in ids if token_id is not None))


def _commonest_format(file: GgufFile) -> str:
    sizes: dict[str, int] = {}
    for tensor in file.tensors.values():
        sizes[tensor.quantization.name] = sizes.get(tensor.quantization.name, 0) + int(np.prod(tensor.shape))
    return max(sizes, key=lambda format_name: sizes[format_name], default="unknown")
