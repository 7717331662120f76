"""From Hugging Face's ``config.json`` to ``ModelConfig``; refuses what the decoder cannot compute, by name.

Both spellings are read: ``rope_theta`` beside ``rope_scaling``, and transformers 5's ``rope_parameters``.
"""

import math
from collections.abc import Mapping
from typing import TypeVar

from disagg.base.errors import ConfigurationError, UnsupportedModelError
from disagg.models.config import (
    SUPPORTED_MODELS,
    Architecture,
    LinearRope,
    Llama3Rope,
    ModelConfig,
    RopeScaling,
    YarnRope,
)

T = TypeVar("T", int, float, bool, str)

_REQUIRED_ROPE_FIELDS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}


class _Fields:
    """Typed access to the entries of a parsed JSON object; errors name the entry and its value."""

    def __init__(self, entries: Mapping[str, object], source: str) -> None:
        self._entries = entries
        self.source = source

    def has(self, name: str) -> bool:
        return self._entries.get(name) is not None

    def raw(self, name: str) -> object:
        return self._entries.get(name)

    def get(self, name: str, kind: type[T], default: T | None = None) -> T:
        """Return the entry as ``kind``; ``null`` and absence give the default, or an error where there is none."""
        value = self._entries.get(name)
        if value is None:
            if default is None:
                raise ConfigurationError(f"{self.source} has no {name!r}: is it a causal language model's?")
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return kind(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ConfigurationError(f"{self.source}: {name!r} should be {kind.__name__}, got {value!r}")
        return value

    def section(self, name: str) -> "_Fields":
        """Return a nested object, empty where it is absent."""
        value = self._entries.get(name)
        if value is None:
            return _Fields({}, self.source)
        if not isinstance(value, Mapping):
            raise ConfigurationError(f"{self.source}: {name!r} should be an object, got {value!r}")
        return _Fields(value, self.source)

    def token_ids(self, name: str) -> tuple[int, ...]:
        """Return an entry that is one token id or a list of them."""
        value = self._entries.get(name)
        ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
        if not all(isinstance(token_id, int) and not isinstance(token_id, bool) for token_id in ids):
            raise ConfigurationError(f"{self.source}: {name!r} should be a token id or a list of them, got {value!r}")
        return ids


def config_from_hf(
    entries: Mapping[str, object],
    generation: Mapping[str, object] | None = None,
    source: str = "config.json",
) -> ModelConfig:
    """Return the configuration that ``config.json``'s ``entries`` describe.

    ``generation`` is ``generation_config.json``, whose end-of-sequence ids win, as in transformers' ``generate``.

    Raises UnsupportedModelError for a model that no code here can run, ConfigurationError for a broken file.
    """
    fields = _Fields(entries, source)
    architecture = _architecture(fields)
    _refuse_unsupported(fields, architecture)
    num_heads = fields.get("num_attention_heads", int)
    num_layers = fields.get("num_hidden_layers", int)
    hidden_size = fields.get("hidden_size", int)
    default_head_dim = 128 if architecture is Architecture.QWEN3 else hidden_size // max(num_heads, 1)
    any_bias = architecture in (Architecture.LLAMA, Architecture.QWEN3) and fields.get("attention_bias", bool, False)
    rope_theta, rope_scaling = _rope(fields, architecture)
    generated = _Fields(generation or {}, "generation_config.json")
    config = ModelConfig(
        architecture=architecture,
        vocab_size=fields.get("vocab_size", int),
        hidden_size=hidden_size,
        intermediate_size=fields.get("intermediate_size", int),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.get("num_key_value_heads", int, num_heads),
        head_dim=fields.get("head_dim", int, default_head_dim),
        rms_norm_eps=fields.get("rms_norm_eps", float, 1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        max_position_embeddings=fields.get("max_position_embeddings", int),
        sliding_windows=_sliding_windows(fields, architecture, num_layers),
        tie_word_embeddings=fields.get("tie_word_embeddings", bool, False),
        qkv_bias=any_bias or architecture is Architecture.QWEN2,
        attention_output_bias=any_bias,
        mlp_bias=architecture is Architecture.LLAMA and fields.get("mlp_bias", bool, False),
        qk_norm=architecture is Architecture.QWEN3,
        bos_token_id=next(iter(fields.token_ids("bos_token_id")), None),
        eos_token_ids=generated.token_ids("eos_token_id") or fields.token_ids("eos_token_id"),
        stored_dtype=fields.get("dtype", str, fields.get("torch_dtype", str, "unknown")),
    )
    check_shape(config, source)
    return config


def check_shape(config: ModelConfig, source: str) -> None:
    """Raise ConfigurationError where sizes contradict each other, before any weight is read."""
    sizes = (
        "vocab_size hidden_size intermediate_size num_layers num_heads num_kv_heads head_dim max_position_embeddings"
    )
    for name in sizes.split():
        if getattr(config, name) < 1:
            raise ConfigurationError(f"{source}: {name} must be at least 1, got {getattr(config, name)}")
    if config.num_heads % config.num_kv_heads:
        raise ConfigurationError(
            f"{source}: {config.num_heads} query heads are not a multiple of {config.num_kv_heads} KV heads"
        )
    if config.head_dim % 2:
        raise ConfigurationError(f"{source}: head_dim {config.head_dim} is odd; rotary embedding needs pairs")


def _unsupported(architecture: str, field: str, value: object, supported: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{architecture} with {field} = {value!r} is not supported; supported: {supported}")


def _architecture(fields: _Fields) -> Architecture:
    names = fields.raw("architectures")
    if not isinstance(names, list) or not names:
        raise ConfigurationError(
            f"{fields.source} has no 'architectures' list: is it the folder of a causal language model?"
        )
    for architecture in Architecture:
        if names[0] == architecture.value:
            return architecture
    raise UnsupportedModelError(
        f"architecture {names[0]!r} ({fields.source}, field 'architectures') is not supported; "
        f"supported: {SUPPORTED_MODELS}"
    )


def _refuse_unsupported(fields: _Fields, architecture: Architecture) -> None:
    name = architecture.value
    if fields.has("quantization_config"):
        method = fields.section("quantization_config").raw("quant_method")
        raise _unsupported(
            name,
            "quantization_config.quant_method",
            method,
            "unquantised safetensors (float32, bfloat16, float16), or any GGUF file",
        )
    activation = fields.get("hidden_act", str, "silu")
    if activation not in ("silu", "swish"):
        raise _unsupported(name, "hidden_act", activation, "'silu'")
    for field in ("num_experts", "num_local_experts", "n_routed_experts"):
        if fields.get(field, int, 0) > 0:
            raise _unsupported(name, field, fields.raw(field), "dense models (no mixture of experts)")
    for field in ("is_encoder_decoder", "use_mrope"):
        if fields.get(field, bool, False):
            raise _unsupported(name, field, True, "decoder-only text models")


def _rope(fields: _Fields, architecture: Architecture) -> tuple[float, RopeScaling | None]:
    """Return the base and the scaling of the rotary embedding."""
    modern = fields.section("rope_parameters")
    section = modern if fields.has("rope_parameters") else fields.section("rope_scaling")
    theta = modern.get("rope_theta", float, fields.get("rope_theta", float, 10_000.0))
    share = modern.get("partial_rotary_factor", float, fields.get("partial_rotary_factor", float, 1.0))
    if share != 1.0:
        raise _unsupported(architecture.value, "partial_rotary_factor", share, "1.0 (the whole head is rotated)")
    kind = section.get("rope_type", str, section.get("type", str, "default"))
    if kind == "default":
        return theta, None
    if kind not in _REQUIRED_ROPE_FIELDS:
        supported = "'default', " + ", ".join(repr(known) for known in _REQUIRED_ROPE_FIELDS)
        raise _unsupported(architecture.value, "rope_type", kind, supported)
    for name in _REQUIRED_ROPE_FIELDS[kind]:
        if not section.has(name):
            raise ConfigurationError(f"{fields.source}: rope scaling {kind!r} has no {name!r}")
    factor = section.get("factor", float)
    if kind == "linear":
        return theta, LinearRope(factor=factor)
    original_length = section.get("original_max_position_embeddings", int, fields.get("max_position_embeddings", int))
    if kind == "llama3":
        return theta, Llama3Rope(
            factor=factor,
            low_freq_factor=section.get("low_freq_factor", float),
            high_freq_factor=section.get("high_freq_factor", float),
            original_max_position_embeddings=original_length,
        )
    return theta, YarnRope(
        factor=factor,
        original_max_position_embeddings=original_length,
        attention_factor=section.get("attention_factor", float, _yarn_attention_factor(section, factor)),
        beta_fast=section.get("beta_fast", float, 32.0),
        beta_slow=section.get("beta_slow", float, 1.0),
        truncate=section.get("truncate", bool, True),
    )


def _yarn_attention_factor(section: _Fields, factor: float) -> float:
    mscale, mscale_all = section.get("mscale", float, 0.0), section.get("mscale_all_dim", float, 0.0)
    if mscale and mscale_all:
        return yarn_magnitude(factor, mscale) / yarn_magnitude(factor, mscale_all)
    return yarn_magnitude(factor)


def yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
    """Return YaRN's correction of the attention logits' size, 0.1 mscale ln(factor) + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def _sliding_windows(fields: _Fields, architecture: Architecture, num_layers: int) -> tuple[int | None, ...]:
    """Return each layer's window. Mistral's holds everywhere, Qwen's where ``use_sliding_window`` and the layer say."""
    if architecture is Architecture.LLAMA:
        return (None,) * num_layers
    window = fields.get("sliding_window", int) if fields.has("sliding_window") else None
    if architecture is Architecture.MISTRAL:
        return (window,) * num_layers
    if window is None or not fields.get("use_sliding_window", bool, False):
        return (None,) * num_layers
    kinds = fields.raw("layer_types")
    if kinds is None:
        first = fields.get("max_window_layers", int, 28)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise ConfigurationError(
            f"{fields.source}: 'layer_types' should be a list of {num_layers} names, got {kinds!r}"
        )
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise _unsupported(architecture.value, "layer_types", kind, "'full_attention', 'sliding_attention'")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
