"""Which layers of a ``config.json`` see a sliding window only, and how long it is."""

from disagg.base.errors import ConfigurationError
from disagg.models.config import Architecture
from disagg.models.config_fields import unsupported
from disagg.models.families import FullBelow, FullEvery, ModelFamily, SlidingLayers
from disagg.models.json_fields import JsonFields


def read_windows(
    fields: JsonFields, architecture: Architecture, family: ModelFamily, num_layers: int
) -> tuple[int | None, ...]:
    """Return each layer's window; ``layer_types`` decides where it is there, else the family's rule.

    Raises UnsupportedModelError for a kind of layer that is not computed, ConfigurationError for contradictions.
    """
    slides = _stated_layers(fields, architecture, family, num_layers) if family.has_layer_types else None
    window = None if family.sliding is None else _window(fields, architecture, family.sliding)
    if window is None:
        if slides and any(slides):
            raise ConfigurationError(
                f"{fields.source}: 'layer_types' has 'sliding_attention', but there is no window: set "
                "'sliding_window' (and Qwen's 'use_sliding_window'), or name the layers 'full_attention'"
            )
        return (None,) * num_layers
    if slides is None and family.sliding is not None:
        slides = _layers_by_rule(fields, family.sliding, num_layers)
    return tuple(window if sliding else None for sliding in slides or ())


def _window(fields: JsonFields, architecture: Architecture, sliding: SlidingLayers) -> int | None:
    """Return the window that sliding layers have, None where no layer slides."""
    used = True if sliding.switch is None else fields.get(sliding.switch, bool, False)
    if fields.stated("sliding_window") and not fields.has("sliding_window"):
        return None
    if not used or (sliding.default_window is None and not fields.has("sliding_window")):
        return None
    window = fields.get("sliding_window", int, sliding.default_window)
    if sliding.switch is None and not fields.get("use_sliding_window", bool, True):
        raise unsupported(architecture, "use_sliding_window", False, "True, or a sliding_window of null")
    if window < 1:
        raise ConfigurationError(f"{fields.source}: 'sliding_window' should be at least 1 or null, got {window}")
    return window


def _layers_by_rule(fields: JsonFields, sliding: SlidingLayers, num_layers: int) -> tuple[bool, ...]:
    match sliding.which:
        case FullBelow(field=field, default=default):
            first = fields.get(field, int, default)
            return tuple(layer >= first for layer in range(num_layers))
        case FullEvery(layers=layers, field=field):
            every = layers if field is None else fields.get(field, int, layers)
            if every < 1:
                raise ConfigurationError(f"{fields.source}: {field!r} should be at least 1, got {every}")
            return tuple((layer + 1) % every != 0 for layer in range(num_layers))
        case None:
            return (True,) * num_layers


def _stated_layers(
    fields: JsonFields, architecture: Architecture, family: ModelFamily, num_layers: int
) -> tuple[bool, ...] | None:
    kinds = fields.raw("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise ConfigurationError(
            f"{fields.source}: 'layer_types' should be a list of {num_layers} names, got {kinds!r}"
        )
    known = ("full_attention",) if family.sliding is None else ("full_attention", "sliding_attention")
    for kind in kinds:
        if kind not in known:
            raise unsupported(architecture, "layer_types", kind, ", ".join(repr(name) for name in known))
    return tuple(kind == "sliding_attention" for kind in kinds)
