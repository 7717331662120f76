"""Reading and writing tokens of the paged pool with PyTorch, in both element orders of ``KvFormat``.

``kv_layer`` is one layer of the pool, [num_blocks, 2, Hk, block_size * D].
"""

import torch

from disagg.cache.layout import KvFormat


def write_kv(
    kv_layer: torch.Tensor,
    kv_format: KvFormat,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: torch.Tensor,
    offsets: torch.Tensor,
) -> None:
    """Write K and V [T, Hk, D] of T tokens; token t goes to place ``offsets[t]`` of block ``blocks[t]`` (int64)."""
    num_tokens, num_heads, head_dim = k.shape
    num_blocks, _, _, head_elements = kv_layer.shape
    block_size = head_elements // head_dim
    if kv_format is KvFormat.TOKEN_MAJOR:
        pool = kv_layer.view(num_blocks, 2, num_heads, block_size, head_dim)
        pool[blocks, 0, :, offsets] = k
        pool[blocks, 1, :, offsets] = v
        return
    lane = _lane(kv_layer)
    k_pool = kv_layer[:, 0].view(num_blocks, num_heads, head_dim // lane, block_size, lane)
    v_pool = kv_layer[:, 1].view(num_blocks, num_heads, block_size // lane, head_dim, lane)
    k_pool[blocks, :, :, offsets] = k.reshape(num_tokens, num_heads, head_dim // lane, lane)
    v_pool[blocks, :, offsets // lane, :, offsets % lane] = v


def gather_kv(
    kv_layer: torch.Tensor, kv_format: KvFormat, blocks: torch.Tensor, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy K and V of ``blocks`` [..., n] out of the pool, as two [..., Hk, n * block_size, D] in token order."""
    gathered = kv_layer[blocks.long()].movedim(-4, -2)
    k, v = gathered.unbind(-4)
    *outer, num_blocks, head_elements = k.shape
    block_size = head_elements // head_dim
    in_order = (*outer, num_blocks * block_size, head_dim)
    if kv_format is KvFormat.TOKEN_MAJOR:
        return k.reshape(in_order), v.reshape(in_order)
    lane = _lane(kv_layer)
    k = k.reshape(*outer, num_blocks, head_dim // lane, block_size, lane).movedim(-3, -2)
    v = v.reshape(*outer, num_blocks, block_size // lane, head_dim, lane).movedim(-1, -2)
    return k.reshape(in_order), v.reshape(in_order)


def _lane(x: torch.Tensor) -> int:
    """Return how many elements make 4 bytes: ``w`` of ``KvFormat.INTERLEAVED``."""
    return 4 // x.element_size()
