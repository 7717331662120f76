"""Shapes for predictions: well-known models by name, and families that are predicted but not computed here (OPT).

Sizes are those of the ``config.json`` on Hugging Face's hub; OPT-175B's, which is not there, those of Zhang et al. 2022
(OPT, table 1).
"""

from collections.abc import Mapping
from typing import Final

import msgspec

from disagg.base.errors import UnsupportedModelError
from disagg.models.hf_config import config_from_hf
from disagg.models.json_fields import JsonFields
from disagg.models.shape import Experts, ModelShape, NormPlacement, QkNorm, check_sizes

_OPT: Final = "OPTForCausalLM"
_OPT_FIXED: Final = {
    "activation_function": "relu",
    "do_layer_norm_before": True,
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
}
"""Fields that change OPT's sizes or operations, and their values in all but its smallest models."""
_OPT_POSITION_OFFSET: Final = 2
"""Rows of the table of positions that no position has."""


def shape_from_hf(entries: Mapping[str, object], source: str) -> ModelShape:
    """Return the shape that ``config.json``'s ``entries`` describe, of a model that need not be one that is computed.

    Raises UnsupportedModelError for a family of which no costs are known, ConfigurationError for a broken file.
    """
    if entries.get("architectures") == [_OPT]:
        return _opt_from_hf(JsonFields(entries, source))
    return config_from_hf(entries, source=source)


def known_shape(name: str) -> ModelShape | None:
    """Return the shape of a model of ``KNOWN_SHAPES``, with its owner's name or without; None where it is none."""
    return KNOWN_SHAPES.get(name.lower().removeprefix("facebook/"))


def _opt_from_hf(fields: JsonFields) -> ModelShape:
    hidden_size, vocab_size = fields.get("hidden_size", int), fields.get("vocab_size", int)
    for name, value in {**_OPT_FIXED, "word_embed_proj_dim": hidden_size}.items():
        if fields.has(name) and fields.raw(name) != value:
            raise UnsupportedModelError(
                f"{fields.source}: {_OPT} with {name} = {fields.raw(name)!r} is not predicted; only {value!r} is"
            )
    return _opt(
        hidden_size,
        fields.get("num_hidden_layers", int),
        fields.get("num_attention_heads", int),
        ffn_dim=fields.get("ffn_dim", int),
        vocab_size=vocab_size,
        max_positions=fields.get("max_position_embeddings", int),
        tied=fields.get("tie_word_embeddings", bool, True),
        source=fields.source,
    )


def _opt(
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    *,
    ffn_dim: int | None = None,
    vocab_size: int = 50_272,
    max_positions: int = 2048,
    tied: bool = True,
    source: str = "OPT",
) -> ModelShape:
    """Return an OPT: as many KV heads as heads, an MLP of two matrices, biases throughout, trained positions."""
    shape = ModelShape(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size if ffn_dim is None else ffn_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // max(num_heads, 1),
        max_position_embeddings=max_positions,
        tie_word_embeddings=tied,
        sliding_windows=(None,) * num_layers,
        gated_mlp=False,
        qkv_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        norm_bias=True,
        num_learned_positions=max_positions + _OPT_POSITION_OFFSET,
    )
    check_sizes(shape, source)
    return shape


def _llama(
    hidden_size: int, intermediate_size: int, num_layers: int, num_kv_heads: int, vocab_size: int, max_positions: int
) -> ModelShape:
    """Return a Llama 2 or 3: heads of 128, no bias, embeddings of its own for the logits."""
    return ModelShape(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=hidden_size // 128,
        num_kv_heads=num_kv_heads,
        head_dim=128,
        max_position_embeddings=max_positions,
        tie_word_embeddings=False,
        sliding_windows=(None,) * num_layers,
    )


def _gemma3(
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    heads: tuple[int, int, int],
    window: int = 1024,
    max_positions: int = 131_072,
) -> ModelShape:
    """Return a Gemma 3's text part: every sixth layer sees all. ``heads``: of queries, of keys, and their size."""
    num_heads, num_kv_heads, head_dim = heads
    return ModelShape(
        vocab_size=262_144,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
        sliding_windows=tuple(None if layer % 6 == 5 else window for layer in range(num_layers)),
        norm_placement=NormPlacement.AROUND,
        qk_norm=QkNorm.HEADS,
    )


def _with_experts(dense: ModelShape, experts: Experts, **sizes: int | QkNorm) -> ModelShape:
    """Return ``dense`` with experts in every layer, and other sizes."""
    return msgspec.structs.replace(dense, layer_experts=(experts,) * dense.num_layers, **sizes)


KNOWN_SHAPES: Final = {
    "opt-13b": _opt(5120, 40, 40),
    "opt-66b": _opt(9216, 64, 72),
    "opt-175b": _opt(12_288, 96, 96),
    "llama-2-7b": _llama(4096, 11_008, 32, 32, 32_000, 4096),
    "llama-2-70b": _llama(8192, 28_672, 80, 8, 32_000, 4096),
    "llama-3-8b": _llama(4096, 14_336, 32, 8, 128_256, 8192),
    "llama-3-70b": _llama(8192, 28_672, 80, 8, 128_256, 8192),
    "mixtral-8x7b": _with_experts(
        _llama(4096, 14_336, 32, 8, 32_000, 32_768),
        Experts(num_experts=8, num_per_token=2, intermediate_size=14_336, normalize_weights=True),
    ),
    "qwen3-30b-a3b": _with_experts(
        _llama(2048, 6144, 48, 4, 151_936, 40_960),
        Experts(num_experts=128, num_per_token=8, intermediate_size=768, normalize_weights=True),
        num_heads=32,
        qk_norm=QkNorm.HEADS,
    ),
    "gemma-3-1b": _gemma3(1152, 6912, 26, (4, 1, 256), window=512, max_positions=32_768),
    "gemma-3-4b": _gemma3(2560, 10_240, 34, (8, 4, 256)),
    "gemma-3-12b": _gemma3(3840, 15_360, 48, (16, 8, 256)),
    "gemma-3-27b": _gemma3(5376, 21_504, 62, (32, 16, 128)),
}
"""What ``simulate --model`` takes by name."""
