"""From Hugging Face's ``config.json`` to ``ModelConfig``; refuses what the decoder cannot compute, by name.

Which fields there are, and what becomes of each, is data in ``config_fields``.
"""

import logging
import math
from collections.abc import Mapping
from typing import Final

from disagg.base.errors import ConfigurationError, UnknownArchitectureError
from disagg.models.config import SUPPORTED_MODELS, Architecture, ModelConfig, YarnRope
from disagg.models.config_fields import check_fields
from disagg.models.families import FAMILIES, ModelFamily
from disagg.models.hf_experts import read_experts
from disagg.models.hf_rope import read_rope
from disagg.models.hf_windows import read_windows
from disagg.models.json_fields import JsonFields
from disagg.models.shape import check_sizes
from disagg.models.text_part import text_entries

_logger = logging.getLogger(__name__)

_CLASSES: Final = {
    **{architecture.value: architecture for architecture in Architecture},
    # Mistral whose layers slide or not one by one.
    "MinistralForCausalLM": Architecture.MISTRAL,
}


def config_from_hf(
    entries: Mapping[str, object],
    generation: Mapping[str, object] | None = None,
    source: str = "config.json",
) -> ModelConfig:
    """Return the configuration that ``config.json``'s ``entries`` describe.

    ``generation`` is ``generation_config.json``, whose end-of-sequence ids join those of ``entries``.

    Raises UnsupportedModelError for a model that our decoder cannot run, ConfigurationError for a broken file.
    """
    entries = text_entries(entries)
    fields = JsonFields(entries, source)
    architecture = _architecture(fields)
    family = FAMILIES[architecture]
    _warn_of_unknown(check_fields(entries, architecture), source)
    num_heads = fields.get("num_attention_heads", int)
    num_layers = fields.get("num_hidden_layers", int)
    hidden_size = fields.get("hidden_size", int)
    head_dim = fields.get("head_dim", int, family.head_dim or hidden_size // max(num_heads, 1))
    any_bias = family.may_have_attention_bias and fields.get("attention_bias", bool, False)
    rope = read_rope(fields, architecture, family)
    config = ModelConfig(
        architecture=architecture,
        vocab_size=fields.get("vocab_size", int),
        hidden_size=hidden_size,
        intermediate_size=fields.get("intermediate_size", int),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.get("num_key_value_heads", int, num_heads),
        head_dim=head_dim,
        rms_norm_eps=fields.get("rms_norm_eps", float, family.rms_norm_eps),
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        rotary_dim=int(head_dim * rope.share),
        sliding_rope_theta=rope.sliding_theta,
        max_position_embeddings=fields.get("max_position_embeddings", int),
        sliding_windows=read_windows(fields, architecture, family, num_layers),
        tie_word_embeddings=fields.get("tie_word_embeddings", bool, family.tie_word_embeddings),
        qkv_bias=any_bias or _has_qkv_bias(fields, family),
        attention_output_bias=any_bias,
        mlp_bias=family.may_have_mlp_bias and fields.get("mlp_bias", bool, False),
        qk_norm=family.qk_norm,
        layer_experts=read_experts(fields, architecture, num_layers),
        norm_placement=family.norm_placement,
        activation=family.activation,
        attention_scale=_attention_scale(fields, family, head_dim),
        attention_softcap=_softcap(fields, "attn_logit_softcapping", family.attention_softcap),
        logit_softcap=_softcap(fields, "final_logit_softcapping", family.logit_softcap),
        embedding_multiplier=_embedding_multiplier(fields, family, hidden_size),
        residual_multiplier=_multiplier(fields, "residual_multiplier", family),
        logit_multiplier=1.0 / _multiplier(fields, "logits_scaling", family),
        fused_projections=family.fused_projections,
        norms_stored_less_one=family.norms_stored_less_one,
        bos_token_id=next(iter(fields.token_ids("bos_token_id")), None),
        eos_token_ids=_eos_token_ids(fields, generation),
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
    if config.rotary_dim % 2 or not 0 < config.rotary_dim <= config.head_dim:
        raise ConfigurationError(
            f"{source}: rotary embedding turns {config.rotary_dim} of a head_dim of {config.head_dim}; it needs pairs"
        )


def _architecture(fields: JsonFields) -> Architecture:
    names = fields.raw("architectures")
    if not isinstance(names, list) or not names:
        raise ConfigurationError(
            f"{fields.source} has no 'architectures' list: is it the folder of a causal language model?"
        )
    architecture = _CLASSES.get(names[0]) if isinstance(names[0], str) else None
    if architecture is None:
        raise UnknownArchitectureError(
            f"architecture {names[0]!r} ({fields.source}, field 'architectures') is not supported; "
            f"supported: {SUPPORTED_MODELS}"
        )
    expected = FAMILIES[architecture].model_types
    model_type = fields.get("model_type", str, expected[0])
    if model_type not in expected:
        raise ConfigurationError(
            f"{fields.source}: 'architectures' says {names[0]!r} and 'model_type' says {model_type!r}; they decide "
            f"what is computed and must agree: {' or '.join(repr(name) for name in expected)} for {names[0]}"
        )
    return architecture


def _eos_token_ids(fields: JsonFields, generation: Mapping[str, object] | None) -> tuple[int, ...]:
    generated = JsonFields(generation or {}, "generation_config.json")
    return tuple(dict.fromkeys(generated.token_ids("eos_token_id") + fields.token_ids("eos_token_id")))


def _has_qkv_bias(fields: JsonFields, family: ModelFamily) -> bool:
    """Whether query, key and value have biases that the output projection lacks."""
    return family.has_qkv_bias and (family.qkv_bias_field is None or fields.get(family.qkv_bias_field, bool, True))


def _warn_of_unknown(names: tuple[str, ...], source: str) -> None:
    if names:
        _logger.warning(
            "%s: nothing here knows %s; the model is computed without it",
            source,
            ", ".join(repr(name) for name in names),
        )


def _attention_scale(fields: JsonFields, family: ModelFamily, head_dim: int) -> float:
    if family.has_multipliers:
        return _multiplier(fields, "attention_multiplier", family)
    if family.query_pre_attn_scalar is None:
        return 1.0 / math.sqrt(max(head_dim, 1))
    return 1.0 / math.sqrt(fields.positive("query_pre_attn_scalar", family.query_pre_attn_scalar))


def _softcap(fields: JsonFields, name: str, default: float | None) -> float | None:
    """Null says that nothing is bounded, where the family bounds by default."""
    if fields.stated(name) or default is None:
        return fields.positive(name) if fields.has(name) else None
    return default


def _embedding_multiplier(fields: JsonFields, family: ModelFamily, hidden_size: int) -> float:
    if family.scales_embeddings:
        return math.sqrt(max(hidden_size, 1))
    return _multiplier(fields, "embedding_multiplier", family)


def _multiplier(fields: JsonFields, name: str, family: ModelFamily) -> float:
    return fields.positive(name, 1.0) if family.has_multipliers else 1.0
