"""The language model within one that takes images too: its part of ``config.json``, and its tensors.

Images are refused by the API; what stands here reads such a checkpoint for its text alone.
"""

from collections.abc import Mapping
from typing import Final

from disagg.models.config import Architecture

_TEXT_MODELS: Final = {"Gemma3ForConditionalGeneration": Architecture.GEMMA3}
"""Classes of transformers with the language model that they hold."""
_LEFT_OUT: Final[Mapping[str, object]] = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131_072,
}
"""What ``text_config`` leaves out is as in transformers' ``Gemma3TextConfig``."""
_SHARED: Final = ("eos_token_id", "dtype", "torch_dtype", "tie_word_embeddings")
_PREFIXES: Final = {"language_model.lm_head.": "lm_head.", "language_model.": "", "model.language_model.": "model."}
_IMAGES: Final = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


def text_entries(entries: Mapping[str, object]) -> Mapping[str, object]:
    """Return the entries of the language model; ``entries`` themselves where there is nothing beside it."""
    names, text = entries.get("architectures"), entries.get("text_config")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    if name not in _TEXT_MODELS or not isinstance(text, dict):
        return entries
    shared = {
        key: entries[key] for key in ("eos_token_id", "dtype", "torch_dtype", "tie_word_embeddings") if key in entries
    }
    return {**_LEFT_OUT, **text, **shared, "architectures": [_TEXT_MODELS[name].value]}


def text_tensor_name(name: str) -> str | None:
    """Return what a tensor of the language model is called without the rest; None for one that only images need."""
    if name.startswith(_IMAGES):
        return None
    for prefix, without in _PREFIXES.items():
        if name.startswith(prefix):
            return without + name.removeprefix(prefix)
    return name
