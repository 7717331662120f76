"""Random steps over a paged pool, for the tests of every kernel backend."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from disagg.cache.layout import KvFormat
from disagg.engine.kernels.interface import StepBatch
from disagg.engine.kernels.kv_format import write_kv


@dataclass(frozen=True)
class Shape:
    """Heads, head dimension and block size of one test case."""

    num_kv_heads: int
    group: int
    head_dim: int
    block_size: int
    dtype: torch.dtype

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group

    @property
    def tolerance(self) -> dict[str, float]:
        """A few roundings of the element type."""
        relative, absolute = {torch.float32: (1e-4, 1e-5), torch.float16: (3e-3, 3e-3), torch.bfloat16: (2e-2, 2e-2)}[
            self.dtype
        ]
        return {"rtol": relative, "atol": absolute}


shapes = st.builds(
    Shape,
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 8),
    head_dim=st.sampled_from([64, 80, 96, 128]),
    block_size=st.sampled_from([16, 32, 64, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)


@st.composite
def sequence_lengths(draw: st.DrawFn, longest: int = 300) -> tuple[int, int]:
    """(context length, new tokens): a decode, a whole prompt or a chunk behind a computed prefix."""
    context = draw(st.integers(1, longest))
    new = draw(st.one_of(st.just(1), st.just(context), st.integers(1, context)))
    return context, new


steps = st.lists(sequence_lengths(), min_size=1, max_size=5)
windows = st.one_of(st.none(), st.integers(1, 300))
softcaps = st.sampled_from([None, None, 0.5, 20.0])


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Compute with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make_batch(lengths: list[tuple[int, int]], block_size: int, num_blocks: int | None = None) -> tuple[StepBatch, int]:
    """Return a step of these (context length, new tokens), its blocks in random order, and the pool's block count."""
    torch.manual_seed(0)
    needed = [-(-context // block_size) for context, _ in lengths]
    num_blocks = num_blocks or sum(needed) + 3
    free = torch.randperm(num_blocks)[: sum(needed)].split(needed)
    tables = torch.zeros((len(lengths), max(needed)), dtype=torch.int32)
    for row, blocks in zip(tables, free, strict=True):
        row[: len(blocks)] = blocks
    new = torch.tensor([length for _, length in lengths], dtype=torch.int32)
    starts = torch.cat((torch.zeros(1, dtype=torch.int32), new.cumsum(0, dtype=torch.int32)))
    positions = torch.cat([torch.arange(context - rows, context) for context, rows in lengths]).int()
    batch = StepBatch(
        token_ids=torch.zeros(len(positions), dtype=torch.int64),
        positions=positions,
        query_start=starts,
        context_lens=torch.tensor([context for context, _ in lengths], dtype=torch.int32),
        block_tables=tables,
        logit_rows=starts[1:].long() - 1,
        max_query_len=int(new.max()),
        max_context_len=max(context for context, _ in lengths),
    )
    return batch, num_blocks


def dirty_pool(shape: Shape, num_blocks: int) -> torch.Tensor:
    """Return one layer of a pool in which what was never written is NaN."""
    size = (num_blocks, 2, shape.num_kv_heads, shape.block_size * shape.head_dim)
    return torch.full(size, torch.nan, dtype=shape.dtype)


def fill_pool(
    kv_layer: torch.Tensor, kv_format: KvFormat, batch: StepBatch, shape: Shape
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Write random K and V for the whole context of each sequence; return them, [context, Hk, D] each."""
    written = []
    for table, context in zip(batch.block_tables, batch.context_lens.tolist(), strict=True):
        k, v = torch.randn((2, context, shape.num_kv_heads, shape.head_dim)).to(shape.dtype)
        places = torch.arange(context)
        blocks = table.long()[places // shape.block_size]
        write_kv(kv_layer, kv_format, k, v, blocks, places % shape.block_size)
        written.append((k, v))
    return written


def dense_attention(
    q: torch.Tensor,
    written: list[tuple[torch.Tensor, torch.Tensor]],
    batch: StepBatch,
    scale: float,
    window: int | None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Return causal attention by its definition, in float64 over dense tensors."""
    parts = []
    rows = batch.query_start.diff().tolist()
    for queries, (k, v) in zip(q.split(rows), written, strict=True):
        group = q.shape[1] // k.shape[1]
        k, v = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", queries.double(), k) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(len(k))[-len(queries) :, None] - torch.arange(len(k))
        hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        parts.append(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
    return torch.cat(parts).to(q.dtype)
