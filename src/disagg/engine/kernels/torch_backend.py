"""The kernel backend in plain PyTorch: reference on CPU, fallback where no compiler is, first backend on CUDA."""

from dataclasses import dataclass
from typing import Final

import torch
from torch.nn import functional

from disagg.base.errors import InternalError
from disagg.cache.layout import KvFormat
from disagg.engine.kernels.blocks import BlockWeight
from disagg.engine.kernels.int8 import Int8Weight, int8_product
from disagg.engine.kernels.interface import Linear, LogitBounds, StepBatch
from disagg.engine.kernels.kv_format import gather_kv, write_kv
from disagg.engine.kernels.prepared_steps import PreparedSteps
from disagg.engine.kernels.weight_memory import PRIVATE, WeightMemory
from disagg.models.config import Activation

_GATHER_BYTES: Final = 256 << 20
"""Most keys and values copied at once out of the pool for a group of decodes."""


class TorchBackend:
    """Every operation through PyTorch, accumulating in float32 and rounding each result once.

    It reads and writes the pool in either order of elements. Steps of decodes alone never wait for the device; a step
    with a prefill chunk does once.
    A StepBatch and its tensors must not change while it is in use: what follows from it is computed once per step.
    """

    name = "torch"
    keeps_weights = True

    def __init__(self, kv_format: KvFormat) -> None:
        self.kv_format = kv_format
        self._steps = PreparedSteps[_Step]()

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

    def add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float,
        *,
        x_norm: torch.Tensor | None = None,
        multiplier: float = 1.0,
    ) -> torch.Tensor:
        """Add x to ``residual`` in place, then return the normalised sum."""
        if x_norm is not None:
            x = self.rms_norm(x, x_norm, eps)
        residual.add_(x, alpha=multiplier)
        return residual if weight is None else self.rms_norm(residual, weight, eps)

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
        head_dim = qkv.shape[1] // (num_heads + 2 * num_kv_heads)
        step = self._prepare(batch, kv_layer, head_dim)
        heads = qkv.view(len(qkv), -1, head_dim)
        q, k, v = heads[:, :num_heads], heads[:, num_heads:-num_kv_heads], heads[:, -num_kv_heads:]
        if q_norm is not None:
            q = self._norm_heads(q, q_norm, eps)
        if k_norm is not None:
            k = self._norm_heads(k, k_norm, eps)
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
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Return causal attention of Q [T, Hq, D] over each sequence's blocks, as [T, Hq * D]."""
        step = self._prepare(batch, kv_layer, q.shape[2])
        pool = _Pool(kv_layer, self.kv_format, batch.block_tables)
        sight = _Sight(scale, sliding_window, softcap)
        if step.chunks is None:
            return self._decode(q, pool, step.context_lens, batch, sight)
        out = torch.empty_like(q)
        for chunk in step.chunks:
            rows = slice(chunk.start, chunk.start + chunk.num_rows)
            out[rows] = _attend_chunk(q[rows], pool, chunk, sight)
        return out.flatten(1)

    def gate(self, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
        """Return activation(left half) * right half."""
        gate, up = gate_up.float().chunk(2, dim=-1)
        match activation:
            case Activation.SILU:
                activated = functional.silu(gate)
            case Activation.GELU_TANH:
                activated = functional.gelu(gate, approximate="tanh")
        return (activated * up).to(gate_up.dtype)

    def bound_logits(self, logits: torch.Tensor, bounds: LogitBounds) -> None:
        """Multiply and bound logits in place."""
        wide = logits.float() * bounds.multiplier
        logits.copy_(wide if bounds.softcap is None else bounds.softcap * torch.tanh(wide / bounds.softcap))

    def _norm_heads(self, heads: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Normalise each head of [T, H, D], or all heads of a token together: so many weights are there."""
        if len(weight) == heads.shape[2]:
            return self.rms_norm(heads, weight, eps)
        return self.rms_norm(heads.flatten(1), weight, eps).view(heads.shape)

    def _decode(
        self, q: torch.Tensor, pool: "_Pool", context_lens: torch.Tensor, batch: StepBatch, sight: "_Sight"
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
                sight,
            )
            for first in range(0, len(q), group)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _prepare(self, batch: StepBatch, kv_layer: torch.Tensor, head_dim: int) -> "_Step":
        block_size = kv_layer.shape[3] // head_dim
        return self._steps.get(batch, block_size, lambda: _prepare_step(batch, block_size, len(kv_layer)))


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
class _Sight:
    """Which keys a row sees, and how scores come from products; see ``KernelBackend.attention``."""

    scale: float
    window: int | None
    softcap: float | None


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
    """Turn the halves of each head's first R elements by ``angles`` [T, 1, R], cosines then sines."""
    cos, sin = angles.chunk(2, dim=-1)
    turning, rest = x[..., : angles.shape[-1]], x[..., angles.shape[-1] :]
    left, right = turning.float().chunk(2, dim=-1)
    return torch.cat(((left * cos - right * sin).to(x.dtype), (right * cos + left * sin).to(x.dtype), rest), dim=-1)


def _attend_decodes(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    context_lens: torch.Tensor,
    sight: "_Sight",
) -> torch.Tensor:
    """Attend with Q [S, Hq, D] over padded K and V [S, Hk, N, D]: the query heads of a KV head are SDPA's rows."""
    num_sequences, num_heads, head_dim = q.shape
    keys = torch.arange(k.shape[2], device=q.device)
    ends = context_lens.unsqueeze(1)
    seen = keys < ends
    if sight.window is not None:
        seen &= keys >= ends - sight.window
    # Blocks are not cleared when they are handed out, nor filled behind a window, and 0 * NaN is NaN.
    unseen = ~seen[:, None, :, None]
    k = k.masked_fill_(unseen, 0)
    v = v.masked_fill_(unseen, 0)
    rows = q.reshape(num_sequences, k.shape[1], num_heads // k.shape[1], head_dim)
    if sight.softcap is not None:
        out = _attend_capped(rows, k, v, seen[:, None, None, :], sight.scale, sight.softcap)
    else:
        out = functional.scaled_dot_product_attention(rows, k, v, attn_mask=seen[:, None, None, :], scale=sight.scale)
    return out.reshape(num_sequences, num_heads * head_dim)


def _attend_capped(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, scale: float, softcap: float
) -> torch.Tensor:
    """Attend with bounded scores, which SDPA does not know; Q [..., n, D] and ``seen`` [..., n, keys] or broadcast."""
    scores = torch.tanh(q.float() @ k.float().transpose(-1, -2) * (scale / softcap)) * softcap
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v.float()).to(q.dtype)


def _attend_chunk(q: torch.Tensor, pool: _Pool, chunk: _Chunk, sight: "_Sight") -> torch.Tensor:
    """Attend with the rows of one sequence, Q [n, Hq, D], over its context; return [n, Hq, D]."""
    num_rows, num_heads, head_dim = q.shape
    num_blocks = -(-chunk.context_len // pool.block_size(head_dim))
    # What is behind the window of the first row may never have been filled.
    first = 0 if sight.window is None else max(0, chunk.context_len - num_rows - sight.window + 1)
    k, v = (x[None, :, first : chunk.context_len] for x in pool.gather(chunk.sequence, num_blocks, head_dim))
    whole_prompt = num_rows == chunk.context_len and sight.window is None and sight.softcap is None
    mask = None
    if not whole_prompt:
        keys = torch.arange(first, chunk.context_len, device=q.device)
        positions = keys[-num_rows:].unsqueeze(1)
        mask = keys <= positions
        if sight.window is not None:
            mask &= keys > positions - sight.window
    if sight.softcap is not None and mask is not None:
        groups = q.reshape(num_rows, k.shape[1], -1, head_dim).permute(1, 2, 0, 3)
        out = _attend_capped(groups, k[0][:, None], v[0][:, None], mask, sight.scale, sight.softcap)
        return out.permute(2, 0, 1, 3).reshape(num_rows, num_heads, head_dim)
    out = functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k,
        v,
        attn_mask=mask,
        is_causal=whole_prompt,
        scale=sight.scale,
        enable_gqa=num_heads != k.shape[1],
    )
    return out[0].transpose(0, 1)
