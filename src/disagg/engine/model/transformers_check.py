"""Whether transformers' code over the paged pool computes what it computes by itself: looked at before it serves."""

from typing import Any, Final

import torch

from disagg.base.errors import UnsupportedModelError
from disagg.cache.layout import KvLayout
from disagg.engine.kernels.interface import StepBatch
from disagg.engine.kv_store import TORCH_DTYPES
from disagg.engine.model.transformers_decoder import TransformersDecoder

_PROMPT: Final = 10
_LENGTH: Final = 16
_TOLERANCE: Final = {torch.float32: 2e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
"""Most difference of a logit, as a share of the largest: rounding, no more."""


def check_paged(decoder: TransformersDecoder, layout: KvLayout) -> None:
    """Compute a short text in two steps over paged KV, and as a whole by transformers alone.

    Raises UnsupportedModelError where they differ, where a layer keeps something else than keys and values, or where
    what a token sees depends on lengths that so short a text does not have.
    """
    _check_lengths(decoder)
    with torch.inference_mode(), torch.device(decoder.device):
        _check_logits(decoder, layout)
    _check_windows(decoder)


def _check_logits(decoder: TransformersDecoder, layout: KvLayout) -> None:
    name = decoder.config.class_name
    tokens = torch.arange(_LENGTH) * 7919 % decoder.config.vocab_size
    num_blocks = -(-_LENGTH // layout.block_size)
    shape = (layout.num_layers, num_blocks, 2, layout.num_kv_heads, layout.block_size * layout.head_dim)
    pool = torch.zeros(shape, dtype=TORCH_DTYPES[layout.dtype])
    decoder.forward(_step(tokens, 0, _PROMPT, num_blocks), pool)
    logits = decoder.forward(_step(tokens, _PROMPT, _LENGTH, num_blocks), pool)[0].float()
    seen = decoder.attention.seen
    if sorted(seen) != list(range(decoder.config.num_layers)):
        raise UnsupportedModelError(
            f"{name}: transformers' code asked for the attention of layers {sorted(seen)} out of "
            f"{decoder.config.num_layers}; what the others keep is no paged KV cache, so it cannot be served"
        )
    expected = _reference(decoder, tokens)
    error = float((logits - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
    if not error <= _TOLERANCE[pool.dtype]:
        raise UnsupportedModelError(
            f"{name}: over a paged KV cache transformers' code gives other logits than by itself (off by "
            f"{error:.1%} of the largest): its attention does more than the interface says, so it cannot be served"
        )


def _reference(decoder: TransformersDecoder, tokens: torch.Tensor) -> torch.Tensor:
    model = decoder.model
    model.set_attn_implementation("eager")
    try:
        logits: torch.Tensor = model(input_ids=tokens[None], use_cache=False).logits[0, -1].float()
    finally:
        model.set_attn_implementation(decoder.attention.name)
    return logits


def _check_windows(decoder: TransformersDecoder) -> None:
    """Refuse a window that the model's code keeps to itself, where sequences may be longer."""
    config = decoder.model.config
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    if window and slides and decoder.max_model_len > window and set(decoder.attention.seen.values()) == {None}:
        raise UnsupportedModelError(
            f"{decoder.config.class_name}: transformers' code does not tell attention of sliding_window = {window}; "
            f"set --max-model-len {window}"
        )


def _check_lengths(decoder: TransformersDecoder) -> None:
    """Refuse what turns differently in long sequences, or sees by chunks, where sequences may be so long."""
    config, length = decoder.model.config, decoder.max_model_len
    rope: Any = getattr(config, "rope_parameters", None) or {}
    limits = {
        "attention_chunk_size": getattr(config, "attention_chunk_size", None),
        "original_max_position_embeddings": rope.get("original_max_position_embeddings")
        if rope.get("rope_type") == "longrope"
        else None,
    }
    for field, limit in limits.items():
        if limit is not None and length > limit:
            raise UnsupportedModelError(
                f"{decoder.config.class_name} with {field} = {limit} can be served by transformers' code up to that "
                f"length only: set --max-model-len {limit}"
            )


def _step(tokens: torch.Tensor, start: int, end: int, num_blocks: int) -> StepBatch:
    rows = end - start
    return StepBatch(
        token_ids=tokens[start:end],
        positions=torch.arange(start, end, dtype=torch.int32),
        query_start=torch.tensor([0, rows], dtype=torch.int32),
        context_lens=torch.tensor([end], dtype=torch.int32),
        block_tables=torch.arange(num_blocks, dtype=torch.int32)[None],
        logit_rows=torch.tensor([rows - 1]),
        max_query_len=rows,
        max_context_len=end,
    )
