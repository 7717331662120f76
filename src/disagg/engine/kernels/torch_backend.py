"""The kernel backend in plain PyTorch: reference on CPU, fallback where no compiler is, first backend on CUDA."""

from dataclasses import dataclass
from typing import Final

import torch
from torch.nn import functional

from disagg.base.errors import InternalError
from disagg.cache.layout import KvFormat
from disagg.engine.kernels.blocks import BlockWeight
from disagg.engine.kernels.int8 import Int8Weight, int8_product
from disagg.engine.kernels.interface import Linear, StepBatch
from disagg.engine.kernels.kv_format import gather_kv, write_kv
from disagg.engine.kernels.weight_memory import PRIVATE, WeightMemory

_GATHER_BYTES: Final = 256 << 20
"""Most keys and values copied at once out of the pool for a group of decodes."""


class TorchBackend:
    """Every operation through PyTorch, accumulating in float32 and rounding each result once.

    On CPU the pool is INTERLEAVED, as for the native backend, so that either can go on where the other stopped; on
    CUDA it is TOKEN_MAJOR. Steps of decodes alone never wait for the device; a step with a prefill chunk does once.
    A StepBatch and its tensors must not change while it is in use: what follows from it is computed once per step.
    """

    name = "torch"

    def __init__(self, kv_format: KvFormat) -> None:
        self.kv_format = kv_format
        self._step: tuple[StepBatch, int, _Step] | None = None

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None, memory: WeightMemory = PRIVATE) -> Linear:
        """Keep ``weight`` as it is."""
        return plain_linear(weight, bias, memory)

    def int8_linear(
        self, weight: Int8Weight, bias: torch.Tensor | None, dtype: torch.dtype, memory: WeightMemory = PRIVATE
    ) -> Linear:
        """Keep ``weight`` as it is: it takes the memory of int8, and more time than bfloat16."""
        return plain_int8_linear(weight, bias, memory)

    def block_linear(
        self, weight: BlockWeight, bias: torch.Tensor | None, dtype: torch.dtype, memory: WeightMemory = PRIVATE
    ) -> Linear:
        """Dequantise ``weight`` for good: PyTorch has no product with such blocks."""
        return plain_linear(weight.dequantized().to(dtype), bias, memory)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Return x / rms(x) * weight over the last dimension."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (wide * weight.float()).to(x.dtype)

    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Add x to ``residual`` in place, then return the normalised sum."""
        residual.add_(x)
        return self.rms_norm(residual, weight, eps)

    def rope_and_write_kv(
        self,
        qkv: torch.Tensor,
        cos_sin: torch.Tensor,
        kv_layer: torch.Tensor,
        batch: StepBatch,
        num_heads: int,
        num_kv_heads: int,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        eps: float,
    ) -> torch.Tensor:
        """Normalise and rotate Q and K, write K and V into the pool, return Q [T, Hq, D]."""
        head_dim = cos_sin.shape[1]
        step = self._prepare(batch, kv_layer, head_dim)
        heads = qkv.view(len(qkv), -1, head_dim)
        q, k, v = heads[:, :num_heads], heads[:, num_heads:-num_kv_heads], heads[:, -num_kv_heads:]
        if q_norm is not None:
            q = self.rms_norm(q, q_norm, eps)
        if k_norm is not None:
            k = self.rms_norm(k, k_norm, eps)
        angles = cos_sin[step.positions].unsqueeze(1)
        write_kv(kv_layer, self.kv_format, _rotate(k, angles), v, step.row_blocks, step.row_offsets)
        return _rotate(q, angles)

    def attention(
        self,
        q: torch.Tensor,
        kv_layer: torch.Tensor,
        batch: StepBatch,
        scale: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """Return causal attention of Q [T, Hq, D] over each sequence's blocks, as [T, Hq * D]."""
        step = self._prepare(batch, kv_layer, q.shape[2])
        pool = _Pool(kv_layer, self.kv_format, batch.block_tables)
        if step.chunks is None:
            return self._decode(q, pool, step.context_lens, batch, scale, sliding_window)
        out = torch.empty_like(q)
        for chunk in step.chunks:
            rows = slice(chunk.start, chunk.start + chunk.num_rows)
            out[rows] = _attend_chunk(q[rows], pool, chunk, scale, sliding_window)
        return out.flatten(1)

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Return silu(left half) * right half."""
        gate, up = gate_up.chunk(2, dim=-1)
        return (functional.silu(gate.float()) * up.float()).to(gate_up.dtype)

    def _decode(
        self,
        q: torch.Tensor,
        pool: "_Pool",
        context_lens: torch.Tensor,
        batch: StepBatch,
        scale: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """Attend with one row per sequence, in groups of sequences whose padded keys and values fit _GATHER_BYTES."""
        num_blocks = -(-batch.max_context_len // pool.block_size(q.shape[2]))
        per_sequence = num_blocks * pool.kv_layer[0].numel() * pool.kv_layer.element_size()
        group = max(1, _GATHER_BYTES // per_sequence)
        parts = [
            _attend_decodes(
                q[first : first + group],
                *pool.gather(slice(first, first + group), num_blocks, q.shape[2]),
                context_lens[first : first + group],
                scale,
                sliding_window,
            )
            for first in range(0, len(q), group)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _prepare(self, batch: StepBatch, kv_layer: torch.Tensor, head_dim: int) -> "_Step":
        block_size = kv_layer.shape[3] // head_dim
        if self._step is None or self._step[0] is not batch or self._step[1] != block_size:
            self._step = (batch, block_size, _prepare_step(batch, block_size, len(kv_layer)))
        return self._step[2]


def plain_linear(weight: torch.Tensor, bias: torch.Tensor | None, memory: WeightMemory) -> Linear:
    """Return a projection by PyTorch, its weight kept as it is."""
    kept = memory.keep(weight)
    kept_bias = None if bias is None else memory.keep(bias)
    return lambda x: functional.linear(x, kept, kept_bias)


def plain_int8_linear(weight: Int8Weight, bias: torch.Tensor | None, memory: WeightMemory) -> Linear:
    """Return a projection by PyTorch, its int8 weight kept as it is."""
    kept = Int8Weight(memory.keep(weight.values), memory.keep(weight.scale))
    kept_bias = None if bias is None else memory.keep(bias)
    return lambda x: int8_product(x, kept, kept_bias)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """The new rows of one sequence, on the host."""

    sequence: int
    start: int
    num_rows: int
    context_len: int


@dataclass(frozen=True, slots=True)
class _Step:
    """What all layers of a step need, derived once from its StepBatch; ``chunks`` is None when all are decodes."""

    positions: torch.Tensor
    row_blocks: torch.Tensor
    row_offsets: torch.Tensor
    context_lens: torch.Tensor
    chunks: tuple[_Chunk, ...] | None


@dataclass(frozen=True, slots=True)
class _Pool:
    """One layer of the pool with the block tables that say which of it belongs to whom."""

    kv_layer: torch.Tensor
    kv_format: KvFormat
    block_tables: torch.Tensor

    def block_size(self, head_dim: int) -> int:
        return self.kv_layer.shape[3] // head_dim

    def gather(self, sequences: int | slice, num_blocks: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K and V [..., Hk, num_blocks * block_size, D] of the first ``num_blocks`` blocks of ``sequences``."""
        return gather_kv(self.kv_layer, self.kv_format, self.block_tables[sequences, :num_blocks], head_dim)


def _prepare_step(batch: StepBatch, block_size: int, num_blocks: int) -> _Step:
    tables = batch.block_tables
    if not tables.is_cuda and tables.numel():
        lowest, highest = (int(bound) for bound in torch.aminmax(tables))
        if lowest < 0 or highest >= num_blocks:
            raise InternalError(
                f"block table has ids from {lowest} to {highest}, the KV pool has blocks 0 to {num_blocks - 1}"
            )
    num_rows = len(batch.positions)
    positions = batch.positions.long()
    lengths = batch.query_start.diff()
    sequences = torch.arange(len(lengths), device=lengths.device)
    row_sequence = torch.repeat_interleave(sequences, lengths, output_size=num_rows)
    chunks = None
    if batch.max_query_len > 1:
        starts, contexts = batch.query_start.tolist(), batch.context_lens.tolist()
        chunks = tuple(
            _Chunk(index, starts[index], starts[index + 1] - starts[index], context)
            for index, context in enumerate(contexts)
        )
    return _Step(
        positions=positions,
        row_blocks=tables[row_sequence, positions // block_size].long(),
        row_offsets=positions % block_size,
        context_lens=batch.context_lens,
        chunks=chunks,
    )


def _rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Turn the halves of each head by ``angles`` [T, 1, D], cosines then sines (Hugging Face's half-split rotation)."""
    cos, sin = angles.chunk(2, dim=-1)
    left, right = x.float().chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x.dtype)


def _attend_decodes(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    sliding_window: int | None,
) -> torch.Tensor:
    """Attend with Q [S, Hq, D] over padded K and V [S, Hk, N, D]: the query heads of a KV head are SDPA's rows."""
    num_sequences, num_heads, head_dim = q.shape
    keys = torch.arange(k.shape[2], device=q.device)
    ends = context_lens.unsqueeze(1)
    # Blocks are not cleared when they are handed out, and 0 * NaN is NaN.
    unwritten = (keys >= ends)[:, None, :, None]
    k = k.masked_fill_(unwritten, 0)
    v = v.masked_fill_(unwritten, 0)
    seen = keys < ends
    if sliding_window is not None:
        seen &= keys >= ends - sliding_window
    rows = q.reshape(num_sequences, k.shape[1], num_heads // k.shape[1], head_dim)
    out = functional.scaled_dot_product_attention(rows, k, v, attn_mask=seen[:, None, None, :], scale=scale)
    return out.reshape(num_sequences, num_heads * head_dim)


def _attend_chunk(
    q: torch.Tensor, pool: _Pool, chunk: _Chunk, scale: float, sliding_window: int | None
) -> torch.Tensor:
    """Attend with the rows of one sequence, Q [n, Hq, D], over its whole context; return [n, Hq, D]."""
    num_rows, num_heads, head_dim = q.shape
    num_blocks = -(-chunk.context_len // pool.block_size(head_dim))
    k, v = (x[None, :, : chunk.context_len] for x in pool.gather(chunk.sequence, num_blocks, head_dim))
    whole_prompt = num_rows == chunk.context_len and sliding_window is None
    mask = None
    if not whole_prompt:
        keys = torch.arange(chunk.context_len, device=q.device)
        positions = keys[-num_rows:].unsqueeze(1)
        mask = keys <= positions
        if sliding_window is not None:
            mask &= keys > positions - sliding_window
    out = functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k,
        v,
        attn_mask=mask,
        is_causal=whole_prompt,
        scale=scale,
        enable_gqa=num_heads != k.shape[1],
    )
    return out[0].transpose(0, 1)
