"""What an instance finds out at its start: how much its KV pool holds and how long a sequence can be."""

from dataclasses import dataclass
from typing import Final

import msgspec

from disagg.base.config import CacheSettings, DType, ModelSettings, SchedulerSettings
from disagg.base.errors import ConfigurationError
from disagg.base.units import format_bytes
from disagg.cache.layout import KvDtype, KvFormat, KvLayout
from disagg.models.shape import ModelShape
from disagg.scheduling.capacity import capacity_tokens, most_in_sight

_KV_DTYPES: Final = {
    DType.FLOAT32: KvDtype.FLOAT32,
    DType.BFLOAT16: KvDtype.BFLOAT16,
    DType.FLOAT16: KvDtype.FLOAT16,
}


@dataclass(frozen=True, slots=True)
class Capacity:
    """The KV pool that fits, and the longest sequence, prompt plus answer, in tokens."""

    layout: KvLayout
    max_model_len: int


def plan_capacity(
    model: ModelSettings,
    cache: CacheSettings,
    config: ModelShape,
    kv_format: KvFormat,
    scheduler: SchedulerSettings | None = None,
    *,
    has_tiers: bool = False,
) -> Capacity:
    """Fill the KV memory with blocks, and bound sequences by what the model and the pool can take.

    With tiers behind the pool all layers are in one block: a file of a tier is one block.
    Raises ConfigurationError, with both numbers and the flag to change, when a sequence of the length asked for does
    not fit.
    """
    num_layers = config.num_layers if has_tiers else config.block_layers
    num_window_layers = config.num_layers - num_layers
    one_block = KvLayout(
        num_layers=num_layers,
        num_blocks=1,
        num_kv_heads=config.num_kv_heads,
        block_size=cache.block_size,
        head_dim=config.head_dim,
        dtype=_KV_DTYPES[model.dtype],
        format=kv_format,
        num_window_layers=num_window_layers,
        window=config.longest_window if num_window_layers else None,
    )
    limit = config.max_position_embeddings
    if model.max_model_len is not None and model.max_model_len > limit:
        raise ConfigurationError(
            f"--max-model-len {model.max_model_len} is over the model's own limit of {limit} tokens: lower it"
        )
    shortest = model.max_model_len or min(2, limit)
    num_blocks = cache.kv_memory_bytes // one_block.block_bytes
    window = one_block.window_blocks
    in_sight = most_in_sight(window, scheduler or SchedulerSettings(), cache.block_size)
    if capacity_tokens(num_blocks, cache.block_size, None, window, in_sight) < shortest:
        num_held = one_block.num_blocks_for(shortest)
        needed = num_held + (0 if window is None else window.num_each * min(num_held, in_sight))
        raise ConfigurationError(
            f"a sequence of {shortest} tokens needs {needed} KV blocks, {needed * one_block.block_bytes} bytes, but "
            f"--kv-memory is {cache.kv_memory_bytes} bytes: raise it, or lower --max-model-len or --block-size"
        )
    layout = msgspec.structs.replace(one_block, num_blocks=num_blocks)
    longest = capacity_tokens(num_blocks, cache.block_size, model.max_model_len or limit, window, in_sight)
    return Capacity(layout=layout, max_model_len=longest)


def layer_tables(config: ModelShape, layout: KvLayout) -> tuple[int, ...]:
    """Return in which of the blocks that belong together each layer is, see ``StepBatch``; nothing for only one."""
    return () if layout.window is None else tuple(layer // layout.num_layers for layer in config.pool_layers)


def check_memory(layout: KvLayout, available_bytes: int, where: str) -> None:
    """Raise ConfigurationError when the pool is larger than the memory that is left on ``where``."""
    if layout.total_bytes > available_bytes:
        raise ConfigurationError(
            f"--kv-memory {format_bytes(layout.total_bytes)} is more than the {format_bytes(available_bytes)} that "
            f"{where} has left: lower it"
        )
