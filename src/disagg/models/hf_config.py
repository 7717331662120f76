"""From Hugging Face's ``config.json`` to ``ModelConfig``; refuses what the decoder cannot compute, by name.

Which fields there are, and what becomes of each, is data in ``config_fields``.
"""

import logging
from collections.abc import Mapping
from typing import Final

from disagg.base.errors import ConfigurationError, UnsupportedModelError
from disagg.models.config import SUPPORTED_MODELS, Architecture, ModelConfig, YarnRope
from disagg.models.config_fields import check_fields, unsupported
from disagg.models.hf_experts import read_experts
from disagg.models.hf_rope import read_rope
from disagg.models.json_fields import JsonFields
from disagg.models.shape import check_sizes

_logger = logging.getLogger(__name__)

_CLASSES: Final = {
    **{architecture.value: architecture for architecture in Architecture},
    # Mistral whose layers slide or not one by one.
    "MinistralForCausalLM": Architecture.MISTRAL,
}
_MODEL_TYPES: Final = {
    Architecture.LLAMA: ("llama",),
    Architecture.MISTRAL: ("mistral", "ministral"),
    Architecture.QWEN2: ("qwen2",),
    Architecture.QWEN3: ("qwen3",),
    Architecture.MIXTRAL: ("mixtral",),
    Architecture.QWEN2_MOE: ("qwen2_moe",),
    Architecture.QWEN3_MOE: ("qwen3_moe",),
}
_BIASED: Final = (Architecture.LLAMA, Architecture.QWEN3, Architecture.QWEN3_MOE)
"""Those whose ``attention_bias`` counts, for all four projections."""
_SLIDES: Final = (Architecture.MISTRAL, Architecture.MIXTRAL)
"""Those that slide unless told otherwise."""
_NEVER_SLIDES: Final = (Architecture.LLAMA, Architecture.QWEN2_MOE, Architecture.QWEN3_MOE)
_DEFAULT_SLIDING_WINDOW: Final = 4096
"""Where the file does not say (null says: none), for the families that slide."""


def config_from_hf(
    entries: Mapping[str, object],
    generation: Mapping[str, object] | None = None,
    source: str = "config.json",
) -> ModelConfig:
    """Return the configuration that ``config.json``'s ``entries`` describe.

    ``generation`` is ``generation_config.json``, whose end-of-sequence ids join those of ``entries``.

    Raises UnsupportedModelError for a model that no code here can run, ConfigurationError for a broken file.
    """
    fields = JsonFields(entries, source)
    architecture = _architecture(fields)
    _warn_of_unknown(check_fields(entries, architecture), source)
    num_heads = fields.get("num_attention_heads", int)
    num_layers = fields.get("num_hidden_layers", int)
    hidden_size = fields.get("hidden_size", int)
    default_head_dim = 128 if architecture is Architecture.QWEN3 else hidden_size // max(num_heads, 1)
    any_bias = architecture in _BIASED and fields.get("attention_bias", bool, False)
    rope_theta, rope_scaling = read_rope(fields, architecture)
    generated = JsonFields(generation or {}, "generation_config.json")
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
        qkv_bias=any_bias or _has_qkv_bias(fields, architecture),
        attention_output_bias=any_bias,
        mlp_bias=architecture is Architecture.LLAMA and fields.get("mlp_bias", bool, False),
        qk_norm=architecture in (Architecture.QWEN3, Architecture.QWEN3_MOE),
        layer_experts=read_experts(fields, architecture, num_layers),
        bos_token_id=next(iter(fields.token_ids("bos_token_id")), None),
        eos_token_ids=tuple(dict.fromkeys(generated.token_ids("eos_token_id") + fields.token_ids("eos_token_id"))),
        stored_dtype=fields.get("dtype", str, fields.get("torch_dtype", str, "unknown")),
    )
    check_config(config, source)
    return config


def check_config(config: ModelConfig, source: str) -> None:
    """Raise ConfigurationError where sizes contradict each other, before any weight is read."""
    check_sizes(config, source)
    if config.rms_norm_eps < 0:
        raise ConfigurationError(f"{source}: rms_norm_eps must be at least 0, got {config.rms_norm_eps}")
    if isinstance(config.rope_scaling, YarnRope) and config.rope_theta <= 1:
        raise ConfigurationError(f"{source}: YaRN needs a rope_theta above 1, got {config.rope_theta}")
    if config.head_dim % 2:
        raise ConfigurationError(f"{source}: head_dim {config.head_dim} is odd; rotary embedding needs pairs")


def _architecture(fields: JsonFields) -> Architecture:
    names = fields.raw("architectures")
    if not isinstance(names, list) or not names:
        raise ConfigurationError(
            f"{fields.source} has no 'architectures' list: is it the folder of a causal language model?"
        )
    architecture = _CLASSES.get(names[0]) if isinstance(names[0], str) else None
    if architecture is None:
        raise UnsupportedModelError(
            f"architecture {names[0]!r} ({fields.source}, field 'architectures') is not supported; "
            f"supported: {SUPPORTED_MODELS}"
        )
    expected = _MODEL_TYPES[architecture]
    model_type = fields.get("model_type", str, expected[0])
    if model_type not in expected:
        raise ConfigurationError(
            f"{fields.source}: 'architectures' says {names[0]!r} and 'model_type' says {model_type!r}; they decide "
            f"what is computed and must agree: {' or '.join(repr(name) for name in expected)} for {names[0]}"
        )
    return architecture


def _has_qkv_bias(fields: JsonFields, architecture: Architecture) -> bool:
    """Whether query, key and value have biases that the output projection lacks."""
    if architecture is Architecture.QWEN2_MOE:
        return fields.get("qkv_bias", bool, True)
    return architecture is Architecture.QWEN2


def _warn_of_unknown(names: tuple[str, ...], source: str) -> None:
    if names:
        _logger.warning(
            "%s: nothing here knows %s; the model is computed without it",
            source,
            ", ".join(repr(name) for name in names),
        )


def _sliding_windows(fields: JsonFields, architecture: Architecture, num_layers: int) -> tuple[int | None, ...]:
    """Return each layer's window.

    ``layer_types`` decides where it is there. Without it Mistral slides everywhere, Qwen from ``max_window_layers`` on.
    """
    slides = _layers_that_slide(fields, architecture, num_layers)
    window = _window(fields, architecture)
    if window is None:
        if slides and any(slides):
            raise ConfigurationError(
                f"{fields.source}: 'layer_types' has 'sliding_attention', but there is no window: set "
                "'sliding_window' (and Qwen's 'use_sliding_window'), or name the layers 'full_attention'"
            )
        return (None,) * num_layers
    if slides is None:
        first = 0 if architecture in _SLIDES else fields.get("max_window_layers", int, 28)
        slides = tuple(layer >= first for layer in range(num_layers))
    return tuple(window if sliding else None for sliding in slides)


def _window(fields: JsonFields, architecture: Architecture) -> int | None:
    """Return the window that sliding layers have, None where no layer slides."""
    if architecture in _NEVER_SLIDES:
        return None
    if architecture is Architecture.MIXTRAL and not fields.has("sliding_window"):
        return None
    used = fields.get("use_sliding_window", bool, architecture in _SLIDES)
    if fields.stated("sliding_window") and not fields.has("sliding_window"):
        return None
    window = fields.get("sliding_window", int, _DEFAULT_SLIDING_WINDOW)
    if architecture in _SLIDES and not used:
        raise unsupported(architecture, "use_sliding_window", used, "True, or a sliding_window of null")
    if used and window < 1:
        raise ConfigurationError(f"{fields.source}: 'sliding_window' should be at least 1 or null, got {window}")
    return window if used else None


def _layers_that_slide(fields: JsonFields, architecture: Architecture, num_layers: int) -> tuple[bool, ...] | None:
    kinds = fields.raw("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise ConfigurationError(
            f"{fields.source}: 'layer_types' should be a list of {num_layers} names, got {kinds!r}"
        )
    known = ("full_attention",) if architecture in _NEVER_SLIDES else ("full_attention", "sliding_attention")
    for kind in kinds:
        if kind not in known:
            raise unsupported(architecture, "layer_types", kind, ", ".join(repr(name) for name in known))
    return tuple(kind == "sliding_attention" for kind in kinds)
