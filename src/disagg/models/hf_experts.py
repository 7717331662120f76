"""Which layers of a ``config.json`` are a mixture of experts, and of which."""

from typing import Final

from disagg.base.errors import ConfigurationError
from disagg.models.config import Architecture
from disagg.models.json_fields import JsonFields
from disagg.models.shape import Experts

EXPERT_MODELS: Final = (Architecture.MIXTRAL, Architecture.QWEN2_MOE, Architecture.QWEN3_MOE, Architecture.OLMOE)
_QWEN: Final = (Architecture.QWEN2_MOE, Architecture.QWEN3_MOE)


def read_experts(fields: JsonFields, architecture: Architecture, num_layers: int) -> tuple[Experts | None, ...]:
    """Return what ``ModelShape.layer_experts`` says; empty for an architecture without experts.

    Raises ConfigurationError for values that are missing or of no use.
    """
    if architecture not in EXPERT_MODELS:
        return ()
    # transformers 5 writes Qwen3-MoE's under Mixtral's name.
    name = "num_experts" if fields.has("num_experts") else "num_local_experts"
    shared = architecture is Architecture.QWEN2_MOE
    experts = Experts(
        num_experts=fields.get(name, int),
        num_per_token=fields.get("num_experts_per_tok", int),
        intermediate_size=fields.get("moe_intermediate_size" if architecture in _QWEN else "intermediate_size", int),
        # Mixtral always does, whatever the file says.
        normalize_weights=architecture is Architecture.MIXTRAL or fields.get("norm_topk_prob", bool, False),
        shared_intermediate_size=fields.get("shared_expert_intermediate_size", int) if shared else 0,
    )
    dense = _dense_layers(fields) if architecture in _QWEN else ()
    period = fields.get("decoder_sparse_step", int, 1) if architecture in _QWEN else 1
    if period < 1:
        raise ConfigurationError(f"{fields.source}: 'decoder_sparse_step' should be at least 1, got {period}")
    return tuple(None if layer in dense or (layer + 1) % period else experts for layer in range(num_layers))


def _dense_layers(fields: JsonFields) -> tuple[int, ...]:
    layers = fields.raw("mlp_only_layers") or []
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise ConfigurationError(f"{fields.source}: 'mlp_only_layers' should be a list of layers, got {layers!r}")
    return tuple(layers)
