"""From a GGUF file's metadata to ``ModelConfig``; refuses what the decoder cannot compute, by name."""

import math
from typing import Final, TypeVar

import numpy as np

from disagg.base.errors import ConfigurationError, UnsupportedModelError
from disagg.models.config import Architecture, FactorsRope, LinearRope, LongRope, ModelConfig, RopeScaling, YarnRope
from disagg.models.families import FAMILIES, FullEvery, ModelFamily
from disagg.models.gguf_fields import check_keys, unsupported_key
from disagg.models.gguf_file import GgufFile
from disagg.models.hf_config import check_config
from disagg.models.hf_rope import longrope_magnitude, yarn_magnitude
from disagg.models.shape import Experts

T = TypeVar("T", int, float, str)

_ARCHITECTURES: Final = {
    "llama": Architecture.LLAMA,
    "qwen2": Architecture.QWEN2,
    "qwen3": Architecture.QWEN3,
    "gemma2": Architecture.GEMMA2,
    "gemma3": Architecture.GEMMA3,
    "phi3": Architecture.PHI3,
    "olmo2": Architecture.OLMO2,
    "granite": Architecture.GRANITE,
    "qwen2moe": Architecture.QWEN2_MOE,
    "qwen3moe": Architecture.QWEN3_MOE,
    "olmoe": Architecture.OLMOE,
}
_SUPPORTED: Final = (
    "'llama' (Llama, SmolLM2, Mistral, Mixtral), 'qwen2', 'qwen3', 'gemma2', 'gemma3', 'phi3' (Phi-3, Phi-4), 'olmo2', "
    "'granite', 'qwen2moe', 'qwen3moe', 'olmoe'"
)
_ROPE_FACTORS: Final = "rope_freqs.weight"
_SHORT_FACTORS: Final = "rope_factors_short.weight"
_LONG_FACTORS: Final = "rope_factors_long.weight"
_LARGEST_GEMMAS: Final = {Architecture.GEMMA2: 46, Architecture.GEMMA3: 62}
"""Layers of the 27B models, whose scores are divided by another root; llama.cpp knows them by these too."""


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
    has_experts = _get(file, f"{name}.expert_count", int, 0) > 0
    architecture = Architecture.MIXTRAL if name == "llama" and has_experts else _ARCHITECTURES[name]
    family = FAMILIES[architecture]
    head_dim, rotary_dim = _head_dims(file, name, family, hidden_size // max(num_heads, 1))
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    num_tokens = len(tokens) if isinstance(tokens, list) else None
    config = ModelConfig(
        architecture=architecture,
        vocab_size=_get(file, f"{name}.vocab_size", int, num_tokens),
        hidden_size=hidden_size,
        intermediate_size=_get(file, f"{name}.feed_forward_length", int),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=_get(file, f"{name}.attention.head_count_kv", int, num_heads),
        head_dim=head_dim,
        rms_norm_eps=_get(file, f"{name}.attention.layer_norm_rms_epsilon", float),
        rope_theta=_positive(file, f"{name}.rope.freq_base", family.rope_theta),
        rope_scaling=_rope_scaling(file, name, rotary_dim),
        rotary_dim=rotary_dim,
        sliding_rope_theta=_sliding_theta(file, name, family),
        max_position_embeddings=_get(file, f"{name}.context_length", int),
        sliding_windows=_sliding_windows(file, name, family, num_layers),
        tie_word_embeddings="output.weight" not in file.tensors,
        qkv_bias=any(f"blk.0.{part}.bias" in file.tensors for part in ("attn_q", "attn_qkv")),
        attention_output_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        layer_experts=_layer_experts(file, name, architecture, num_layers) if has_experts else (),
        qk_norm=family.qk_norm,
        norm_placement=family.norm_placement,
        activation=family.activation,
        attention_scale=_attention_scale(file, name, architecture, num_heads, hidden_size, head_dim),
        attention_softcap=_softcap(file, f"{name}.attn_logit_softcapping", family.attention_softcap),
        logit_softcap=_softcap(file, f"{name}.final_logit_softcapping", family.logit_softcap),
        embedding_multiplier=_embedding_multiplier(file, name, family, hidden_size),
        residual_multiplier=_multiplier(file, f"{name}.residual_scale"),
        logit_multiplier=1.0 / _multiplier(file, f"{name}.logit_scale"),
        fused_projections=family.fused_projections,
        bos_token_id=_optional_id(file, "bos"),
        eos_token_ids=_eos_token_ids(file),
        stored_dtype=_commonest_format(file),
    )
    check_config(config, str(file.path))
    return config


def _layer_experts(
    file: GgufFile, name: str, architecture: Architecture, num_layers: int
) -> tuple[Experts | None, ...]:
    """Return the experts of each layer that has a router. Defaults are llama.cpp's, and transformers' of the family."""
    inner, num_per_token = (_get(file, f"{name}.{key}", int) for key in ("feed_forward_length", "expert_used_count"))
    default = inner // max(num_per_token, 1) if name in ("qwen2moe", "qwen3moe") else inner
    normalizes = architecture in (Architecture.MIXTRAL, Architecture.QWEN3_MOE)
    shared = _get(file, f"{name}.expert_shared_feed_forward_length", int, inner) if name == "qwen2moe" else 0
    experts = Experts(
        num_experts=_get(file, f"{name}.expert_count", int),
        num_per_token=num_per_token,
        intermediate_size=_get(file, f"{name}.expert_feed_forward_length", int, default),
        normalize_weights=_get_bool(file, f"{name}.expert_weights_norm", normalizes),
        shared_intermediate_size=shared,
    )
    return tuple(experts if f"blk.{layer}.ffn_gate_inp.weight" in file.tensors else None for layer in range(num_layers))


def _get_bool(file: GgufFile, key: str, default: bool) -> bool:
    value = file.metadata.get(key, default)
    if not isinstance(value, bool):
        raise ConfigurationError(f"{file.path}: metadata key {key!r} should be true or false, got {value!r}")
    return value


def _head_dims(file: GgufFile, name: str, family: ModelFamily, default: int) -> tuple[int, int]:
    """Return the length of a head, and how much of it rotary embedding turns."""
    head_dim = _get(file, f"{name}.attention.key_length", int, default)
    rotary_dim = _get(file, f"{name}.rope.dimension_count", int, head_dim)
    if rotary_dim != head_dim and not family.turns_parts_of_heads:
        raise unsupported_key(file, f"{name}.rope.dimension_count", rotary_dim, f"the whole head, {head_dim}")
    value_dim = _get(file, f"{name}.attention.value_length", int, head_dim)
    if value_dim != head_dim:
        raise unsupported_key(file, f"{name}.attention.value_length", value_dim, f"as long as keys, {head_dim}")
    return head_dim, rotary_dim


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


def _sliding_windows(file: GgufFile, name: str, family: ModelFamily, num_layers: int) -> tuple[int | None, ...]:
    """Return the windows that transformers has; llama.cpp leaves Phi-3's out."""
    if family.sliding is None:
        return (None,) * num_layers
    window = _get(file, f"{name}.attention.sliding_window", int, family.sliding.default_window or 0)
    if name not in ("gemma2", "gemma3", "phi3") or window < 1:
        return (None,) * num_layers
    every = family.sliding.which.layers if isinstance(family.sliding.which, FullEvery) else num_layers + 1
    return tuple(window if (layer + 1) % every else None for layer in range(num_layers))


def _sliding_theta(file: GgufFile, name: str, family: ModelFamily) -> float | None:
    if family.sliding_rope_theta is None:
        return None
    return _positive(file, f"{name}.rope.freq_base_swa", family.sliding_rope_theta)


def _attention_scale(
    file: GgufFile, name: str, architecture: Architecture, num_heads: int, hidden_size: int, head_dim: int
) -> float:
    num_layers = _get(file, f"{name}.block_count", int)
    divisor = hidden_size / max(num_heads, 1) if num_layers == _LARGEST_GEMMAS.get(architecture) else head_dim
    default: float = max(divisor, 1) ** -0.5
    scale = _get(file, f"{name}.attention.scale", float, 0.0)
    return scale if scale > 0 else default


def _softcap(file: GgufFile, key: str, default: float | None) -> float | None:
    """Return where scores or logits are bounded; 0 says nowhere."""
    return _get(file, key, float, default or 0.0) or None


def _embedding_multiplier(file: GgufFile, name: str, family: ModelFamily, hidden_size: int) -> float:
    if family.scales_embeddings:
        return math.sqrt(max(hidden_size, 1))
    return _multiplier(file, f"{name}.embedding_scale")


def _multiplier(file: GgufFile, key: str) -> float:
    """Return a factor; 0 is how llama.cpp says that there is none."""
    return _get(file, key, float, 0.0) or 1.0


def _rope_scaling(file: GgufFile, name: str, rotary_dim: int) -> RopeScaling | None:
    """Return the scaling as llama.cpp reads it: a factor without a type is linear."""
    prefix = f"{name}.rope.scaling"
    if _LONG_FACTORS in file.tensors:
        return _longrope(file, name, rotary_dim)
    factor = _get(file, f"{prefix}.factor", float, _get(file, f"{name}.rope.scale_linear", float, 0.0))
    kind = _get(file, f"{prefix}.type", str, "linear" if factor not in (0.0, 1.0) else "none")
    if kind not in ("none", "linear", "yarn"):
        raise unsupported_key(file, f"{prefix}.type", kind, "'none', 'linear', 'yarn', or rope_freqs.weight")
    if _ROPE_FACTORS in file.tensors:
        if kind != "none":
            raise unsupported_key(file, f"{prefix}.type", kind, f"'none' beside {_ROPE_FACTORS}")
        return FactorsRope(divisors=_rope_divisors(file, _ROPE_FACTORS, rotary_dim))
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


def _longrope(file: GgufFile, name: str, rotary_dim: int) -> LongRope:
    """Return Phi-3's scaling, whose attention factor is written where it is not 1."""
    context_length = _get(file, f"{name}.context_length", int)
    original_length = _get(file, f"{name}.rope.scaling.original_context_length", int, context_length)
    magnitude = longrope_magnitude(context_length / max(original_length, 1), original_length)
    return LongRope(
        short_divisors=_rope_divisors(file, _SHORT_FACTORS, rotary_dim),
        long_divisors=_rope_divisors(file, _LONG_FACTORS, rotary_dim),
        original_max_position_embeddings=original_length,
        attention_factor=_positive(file, f"{name}.rope.scaling.attn_factor", magnitude),
    )


def _rope_divisors(file: GgufFile, tensor: str, rotary_dim: int) -> tuple[float, ...]:
    divisors = file.read(tensor) if tensor in file.tensors else np.empty(0)
    if divisors.shape != (rotary_dim // 2,) or not (divisors > 0).all():
        raise ConfigurationError(
            f"{file.path}: tensor {tensor!r} should hold {rotary_dim // 2} numbers above 0, one for each pair of "
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
