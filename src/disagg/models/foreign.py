"""Models that transformers' modelling code computes: what must be known of them beforehand, read under many names.

The sizes are those of the KV cache. That the model's code really has them is checked when it is loaded.
"""

from collections.abc import Mapping
from typing import Final

from disagg.base.errors import ConfigurationError
from disagg.models.json_fields import JsonFields
from disagg.models.shape import ModelShape, check_sizes

_LAYERS: Final = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_WIDTH: Final = ("hidden_size", "n_embd", "d_model")
_HEADS: Final = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_KV_HEADS: Final = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_INNER: Final = ("intermediate_size", "n_inner", "ffn_dim", "d_ff")
_POSITIONS: Final = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length")
_CAUSAL: Final = ("CausalLM", "LMHead")
"""What transformers' classes are called that predict the next token."""


class ForeignModel(ModelShape, frozen=True, kw_only=True):
    """A causal language model whose arithmetic is its own code's; ``class_name`` is Hugging Face's."""

    class_name: str
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    stored_dtype: str = "unknown"


def foreign_from_hf(
    entries: Mapping[str, object], generation: Mapping[str, object] | None = None, source: str = "config.json"
) -> ForeignModel:
    """Return what ``config.json``'s ``entries`` say; ``generation`` is ``generation_config.json``.

    Raises ConfigurationError for a class that predicts no next token, and where a size is not there under any name that
    families use.
    """
    fields = JsonFields(entries, source)
    generated = JsonFields(generation or {}, "generation_config.json")
    names = fields.raw("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise ConfigurationError(f"{source} has no 'architectures' list: is it the folder of a causal language model?")
    if not any(word in names[0] for word in _CAUSAL):
        raise ConfigurationError(f"{source}: {names[0]!r} is no causal language model (ForCausalLM or LMHeadModel)")
    num_heads, hidden_size = _size(fields, _HEADS), _size(fields, _WIDTH)
    num_layers = _size(fields, _LAYERS)
    model = ForeignModel(
        class_name=names[0],
        vocab_size=fields.get("vocab_size", int),
        hidden_size=hidden_size,
        intermediate_size=_size(fields, _INNER, 4 * hidden_size),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=_size(fields, _KV_HEADS, num_heads),
        head_dim=fields.get("head_dim", int, hidden_size // max(num_heads, 1)),
        max_position_embeddings=_size(fields, _POSITIONS),
        tie_word_embeddings=fields.get("tie_word_embeddings", bool, True),
        sliding_windows=(None,) * num_layers,
        bos_token_id=next(iter(fields.token_ids("bos_token_id")), None),
        eos_token_ids=tuple(dict.fromkeys(generated.token_ids("eos_token_id") + fields.token_ids("eos_token_id"))),
        stored_dtype=fields.get("dtype", str, fields.get("torch_dtype", str, "unknown")),
    )
    check_sizes(model, source)
    return model


def _size(fields: JsonFields, names: tuple[str, ...], default: int | None = None) -> int:
    """Return the first of ``names`` that is there."""
    for name in names:
        if fields.has(name):
            return fields.get(name, int)
    if default is None:
        raise ConfigurationError(f"{fields.source} has none of {', '.join(map(repr, names))}: its KV cache has no size")
    return default
