"""The rotary embedding that a ``config.json`` describes, equal to transformers' or refused by name.

Three spellings are read: ``rope_theta`` alone, ``rope_theta`` beside ``rope_scaling``, and transformers 5's
``rope_parameters``. Where both sections are there, ``rope_scaling`` replaces the other one, as in transformers.
"""

import math
from typing import Final

from disagg.base.errors import ConfigurationError
from disagg.models.config import Architecture, LinearRope, Llama3Rope, RopeScaling, YarnRope
from disagg.models.config_fields import unsupported
from disagg.models.json_fields import JsonFields

DEFAULT_THETA: Final = 10_000.0

_FIELDS: Final[dict[str, tuple[str, ...]]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
}
"""What each type's frequencies depend on, beside the fields that all know."""

_REQUIRED: Final = {"factor", "low_freq_factor", "high_freq_factor"}
_COMMON: Final = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
_HARMLESS: Final = {"finetuned"}


def read_rope(fields: JsonFields, architecture: Architecture) -> tuple[float, RopeScaling | None]:
    """Return the base and the scaling of the rotary embedding.

    Raises UnsupportedModelError for a type, or a field of it, that is not computed here, ConfigurationError for values
    that are missing, of no use, or in contradiction.
    """
    section = _section(fields)
    theta = section.positive("rope_theta", fields.positive("rope_theta", DEFAULT_THETA))
    _refuse_lost_theta(fields, theta)
    share = section.get("partial_rotary_factor", float, fields.get("partial_rotary_factor", float, 1.0))
    if share != 1.0:
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
    return theta, _scaling(kind, section, fields)


def _section(fields: JsonFields) -> JsonFields:
    return fields.section("rope_scaling" if fields.raw("rope_scaling") else "rope_parameters")


def _refuse_lost_theta(fields: JsonFields, theta: float) -> None:
    """``rope_scaling`` replaces ``rope_parameters`` with the base in it; nobody means that who states another base."""
    other = fields.section("rope_parameters").get("rope_theta", float, theta)
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
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise unsupported(architecture, "rope_type", kind, supported)
    return kind


def _scaling(kind: str, section: JsonFields, fields: JsonFields) -> RopeScaling | None:
    for name in _FIELDS[kind]:
        if name in _REQUIRED and not section.has(name):
            raise ConfigurationError(f"{section.source}: rope scaling {kind!r} has no {name!r}")
    if kind == "default":
        return None
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
