"""Every metadata key of a GGUF model that is known here, as data; the counterpart of ``config_fields``.

Names and neutral values are llama.cpp's (``llama-arch.cpp``, ``llama-hparams.h``); keys stand without the
architecture's prefix.
"""

import logging
from dataclasses import dataclass
from typing import Final

import numpy as np

from disagg.base.errors import UnsupportedModelError
from disagg.models.gguf_file import GgufFile

_logger = logging.getLogger(__name__)

READ_KEYS: Final = frozenset(
    {
        "vocab_size",
        "context_length",
        "embedding_length",
        "block_count",
        "feed_forward_length",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scale_linear",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
    }
)
"""What ``gguf_config`` reads."""

_SLIDING: Final = frozenset({"attention.sliding_window"})
_EXPERTS: Final = frozenset({"expert_count", "expert_used_count", "expert_weights_norm"})
ARCHITECTURE_KEYS: Final = {
    "llama": _EXPERTS,
    "qwen2moe": _EXPERTS | {"expert_feed_forward_length", "expert_shared_feed_forward_length"},
    "qwen3moe": _EXPERTS | {"expert_feed_forward_length"},
    "olmoe": _EXPERTS,
    "gemma2": _SLIDING | {"attn_logit_softcapping", "final_logit_softcapping"},
    "gemma3": _SLIDING | {"final_logit_softcapping", "rope.freq_base_swa"},
    "phi3": _SLIDING | {"rope.scaling.attn_factor"},
    "granite": frozenset({"attention.scale", "embedding_scale", "residual_scale", "logit_scale"}),
}
"""What it reads for one architecture, and others may not have."""

HARMLESS_KEYS: Final = frozenset({"rope.scaling.finetuned", "tensor_data_layout", "decoder_start_token_id"})


@dataclass(frozen=True, slots=True)
class LimitedKey:
    """A key that the decoder follows for the values of ``allowed`` alone."""

    name: str
    allowed: tuple[object, ...]
    supported: str


_DENSE: Final = "dense models (no mixture of experts)"
_FOLDER: Final = "1.0; readers differ in what it multiplies, serve the model's Hugging Face folder"

LIMITED_KEYS: Final = (
    LimitedKey("expert_count", (0,), _DENSE),
    LimitedKey("expert_used_count", (0,), _DENSE),
    LimitedKey("expert_shared_count", (0,), _DENSE),
    LimitedKey("expert_gating_func", (0, 1), "1 (softmax)"),
    LimitedKey("expert_weights_scale", (0, 1), "1.0"),
    LimitedKey("expert_group_count", (0, 1), "one group of experts"),
    LimitedKey("leading_dense_block_count", (0,), "0"),
    LimitedKey("interleave_moe_layer_step", (0, 1), "1 (experts in every layer)"),
    LimitedKey(
        "attention.sliding_window",
        (0,),
        "files without it; serve the model's Hugging Face folder, which says which layers slide",
    ),
    LimitedKey("attention.sliding_window_pattern", (0,), "files without it"),
    LimitedKey("rope.scaling.attn_factor", (1,), _FOLDER),
    LimitedKey("rope.scaling.yarn_attn_factor", (1,), _FOLDER),
    LimitedKey("rope.scaling.yarn_log_multiplier", (0,), "0; serve the model's Hugging Face folder"),
    LimitedKey("rope.scaling.yarn_ext_factor", (1, -1), "1.0, or -1.0 for the default"),
    LimitedKey("rope.scaling.alpha", (0,), "files without it"),
    LimitedKey("rope.dimension_sections", (), "one rotary embedding"),
    LimitedKey("rope.dimension_count_swa", (), "one rotary embedding"),
    LimitedKey("rope.freq_base_swa", (), "one rotary embedding"),
    LimitedKey("attention.causal", (True,), "True"),
    LimitedKey("attention.scale", (0,), "0 (head_dim ** -0.5)"),
    LimitedKey("attention.output_scale", (0, 1), "1.0"),
    LimitedKey("attention.clamp_kqv", (0,), "0"),
    LimitedKey("attention.max_alibi_bias", (0,), "0"),
    LimitedKey("attention.temperature_length", (0,), "0"),
    LimitedKey("attention.temperature_scale", (0,), "0"),
    LimitedKey("attention.shared_kv_layers", (0,), "0"),
    LimitedKey("attention.layer_norm_epsilon", (), "attention.layer_norm_rms_epsilon (RMS norm)"),
    LimitedKey("attn_logit_softcapping", (0,), "0"),
    LimitedKey("final_logit_softcapping", (0,), "0"),
    LimitedKey("logit_scale", (0, 1), "1.0"),
    LimitedKey("residual_scale", (0, 1), "1.0"),
    LimitedKey("embedding_scale", (0, 1), "1.0"),
    LimitedKey("use_parallel_residual", (False,), "False"),
    LimitedKey("swin_norm", (False,), "False"),
    LimitedKey("nextn_predict_layers", (0,), "0"),
    LimitedKey("pooling_type", (0,), "0 (a model that writes)"),
)


def check_keys(file: GgufFile, architecture: str) -> None:
    """Warn of the keys of ``architecture`` that nothing here knows.

    Raises UnsupportedModelError, naming the first key whose value the decoder does not compute.
    """
    own = ARCHITECTURE_KEYS.get(architecture, frozenset())
    limits = {f"{architecture}.{key.name}": key for key in LIMITED_KEYS if key.name not in own}
    limits["split.count"] = _SPLIT
    known = {f"{architecture}.{name}" for name in READ_KEYS | HARMLESS_KEYS | own}
    unknown = []
    for key, value in file.metadata.items():
        limit = limits.get(key)
        if limit is None:
            if key.startswith(f"{architecture}.") and key not in known:
                unknown.append(key)
        elif isinstance(value, np.ndarray | list) or value not in limit.allowed:
            raise unsupported_key(file, key, value, limit.supported)
    if unknown:
        _logger.warning(
            "%s: nothing here knows %s; the model is computed without it",
            file.path,
            ", ".join(repr(key) for key in unknown),
        )


def unsupported_key(file: GgufFile, key: str, value: object, supported: str) -> UnsupportedModelError:
    """Return the refusal of one key's value: what it is, and what can be served."""
    name = file.metadata["general.architecture"]
    return UnsupportedModelError(
        f"{file.path}: GGUF architecture {name!r} with {key} = {value!r} is not supported; supported: {supported}"
    )


_SPLIT: Final = LimitedKey("split.count", (0, 1), "one file (llama-gguf-split --merge joins the parts)")
