"""The rotary embedding that a ``config.json`` describes, equal to transformers' or refused by name.

Three spellings are read: ``rope_theta`` alone, ``rope_theta`` beside ``rope_scaling``, and transformers 5's
``rope_parameters``. Where both sections are there, ``rope_scaling`` replaces the other one, as in transformers.
"""

import math
from dataclasses import dataclass
from typing import Final

from disagg.base.errors import ConfigurationError
from disagg.models.config import Architecture, LinearRope, Llama3Rope, LongRope, RopeScaling, YarnRope
from disagg.models.config_fields import unsupported
from disagg.models.families import ModelFamily
from disagg.models.json_fields import JsonFields

_FIELDS: Final[dict[str, tuple[str, ...]]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor", "factor", "attention_factor"),
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
}
"""What each type's frequencies depend on, beside the fields that all know."""

_REQUIRED: Final[dict[str, tuple[str, ...]]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
    "yarn": ("factor",),
}
_COMMON: Final = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
_HARMLESS: Final = {"finetuned"}
_OLD_NAMES: Final = {"su": "longrope", "yarn": "longrope"}
"""What Phi-3's first files call LongRoPE."""


@dataclass(frozen=True, slots=True)
class RopeEntries:
    """Base, scaling, the share of a head that turns, and another base where layers with a window have one."""

    theta: float
    scaling: RopeScaling | None
    share: float
    sliding_theta: float | None


def read_rope(fields: JsonFields, architecture: Architecture, family: ModelFamily) -> RopeEntries:
    """Return what a file says of the rotary embedding.

    Raises UnsupportedModelError for a type, or a field of it, that is not computed here, ConfigurationError for values
    that are missing, of no use, or in contradiction.
    """
    parameters = fields.section("rope_parameters")
    sliding_theta = None
    if family.sliding_rope_theta is not None:
        sliding_theta = _sliding_theta(fields, parameters.section("sliding_attention"), architecture, family)
        parameters = parameters.section("full_attention")
    section = fields.section("rope_scaling") if fields.raw("rope_scaling") else parameters
    theta = section.positive("rope_theta", fields.positive("rope_theta", family.rope_theta))
    _refuse_lost_theta(fields, parameters, theta)
    share = section.get("partial_rotary_factor", float, fields.get("partial_rotary_factor", float, 1.0))
    if share != 1.0 and not (family.turns_parts_of_heads and 0 < share < 1):
        raise unsupported(architecture, "partial_rotary_factor", share, "1.0 (the whole head is rotated)")
    kind = _kind(section, architecture)
    for name in section:
        known = name in _COMMON | _HARMLESS or name in _FIELDS[kind]
        if not known and section.has(name) and (name, section.raw(name)) != ("factor", 1):
            raise unsupported(
                architecture,
                f"{name!r} in a rope of type {kind!r}",
                section.raw(name),
                ", ".join(repr(used) for used in _FIELDS[kind]) or "no further field",
            )
    return RopeEntries(theta, _scaling(kind, section, fields), share, sliding_theta)


def _sliding_theta(fields: JsonFields, section: JsonFields, architecture: Architecture, family: ModelFamily) -> float:
    kind = _kind(section, architecture)
    if kind != "default":
        raise unsupported(architecture, "rope_type of sliding_attention", kind, "'default'")
    return section.positive("rope_theta", fields.positive("rope_local_base_freq", family.sliding_rope_theta))


def _refuse_lost_theta(fields: JsonFields, parameters: JsonFields, theta: float) -> None:
    """``rope_scaling`` replaces ``rope_parameters`` with the base in it; nobody means that who states another base."""
    other = parameters.get("rope_theta", float, theta)
    if other != theta:
        raise ConfigurationError(
            f"{fields.source}: 'rope_scaling' replaces 'rope_parameters', whose rope_theta {other} would be lost for "
            f"{theta}; write one section, with rope_theta in it"
        )


def _kind(section: JsonFields, architecture: Architecture) -> str:
    names = [section.raw(key) for key in ("rope_type", "type") if section.has(key)]
    supported = ", ".join(repr(known) for known in _FIELDS)
    if not names and (section.stated("rope_type") or section.stated("type")):
        raise unsupported(architecture, "rope_type", None, supported)
    kind = names[0] if names else "default"
    if len(names) == 2 and names[0] != names[1]:
        raise ConfigurationError(f"{section.source}: 'rope_type' says {names[0]!r} and 'type' says {names[1]!r}")
    if architecture is Architecture.PHI3 and isinstance(kind, str):
        kind = _OLD_NAMES.get(kind, kind)
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise unsupported(architecture, "rope_type", kind, supported)
    return kind


def _scaling(kind: str, section: JsonFields, fields: JsonFields) -> RopeScaling | None:
    for name in _REQUIRED[kind]:
        if not section.has(name):
            raise ConfigurationError(f"{section.source}: rope scaling {kind!r} has no {name!r}")
    if kind == "default":
        return None
    if kind == "longrope":
        return _longrope(section, fields)
    factor = section.positive("factor")
    if kind == "dynamic":
        # It changes the base beyond max_position_embeddings alone, and no sequence here is longer than that.
        return None
    if kind == "linear":
        return LinearRope(factor=factor)
    original_length = _original_length(section, fields)
    return _llama3(section, factor, original_length) if kind == "llama3" else _yarn(section, factor, original_length)


def _original_length(section: JsonFields, fields: JsonFields) -> int:
    """A length beside the section wins, as in transformers (Phi 3 states it there)."""
    name = "original_max_position_embeddings"
    holder = fields if fields.has(name) else section
    length = holder.get(name, int, fields.get("max_position_embeddings", int))
    if length < 1:
        raise ConfigurationError(f"{holder.source}: {name!r} should be at least 1, got {length}")
    return length


def _longrope(section: JsonFields, fields: JsonFields) -> LongRope:
    original_length = _original_length(section, fields)
    factor = section.positive("factor", fields.get("max_position_embeddings", int) / original_length)
    return LongRope(
        short_divisors=section.positives("short_factor"),
        long_divisors=section.positives("long_factor"),
        original_max_position_embeddings=original_length,
        attention_factor=section.positive("attention_factor", longrope_magnitude(factor, original_length)),
    )


def longrope_magnitude(factor: float, original_length: int) -> float:
    """Return LongRoPE's correction of the attention logits' size, sqrt(1 + ln(factor) / ln(original length))."""
    if factor <= 1.0 or original_length < 2:
        return 1.0
    return math.sqrt(1 + math.log(factor) / math.log(original_length))


def _llama3(section: JsonFields, factor: float, original_length: int) -> Llama3Rope:
    low, high = section.positive("low_freq_factor"), section.positive("high_freq_factor")
    if low >= high:
        raise ConfigurationError(f"{section.source}: low_freq_factor {low} must be below high_freq_factor {high}")
    return Llama3Rope(
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=original_length,
    )


def _yarn(section: JsonFields, factor: float, original_length: int) -> YarnRope:
    mscale, mscale_all = section.get("mscale", float, 0.0), section.get("mscale_all_dim", float, 0.0)
    if mscale and mscale_all:
        attention_factor = yarn_magnitude(factor, mscale) / yarn_magnitude(factor, mscale_all)
    else:
        attention_factor = yarn_magnitude(factor)
    return YarnRope(
        factor=factor,
        original_max_position_embeddings=original_length,
        attention_factor=section.positive("attention_factor", attention_factor),
        beta_fast=_beta(section, "beta_fast", 32.0),
        beta_slow=_beta(section, "beta_slow", 1.0),
        truncate=section.get("truncate", bool, True),
    )


def _beta(section: JsonFields, name: str, default: float) -> float:
    """Zero means the default, as in transformers."""
    return section.positive(name, default) if section.raw(name) != 0 else default


def yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
    """Return YaRN's correction of the attention logits' size, 0.1 mscale ln(factor) + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0
