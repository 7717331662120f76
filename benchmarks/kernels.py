"""The native kernels against this machine's limits: read bandwidth for decode, bf16 GEMM peak for prefill.

    python benchmarks/kernels.py [--threads 1 2] [--backend native torch] [--quick]

The shape is SmolLM2-135M's: 9 query heads, 3 KV heads, head dimension 64, 30 layers, bfloat16. Both limits are measured
in the same run with the same threads. A time is the sum over the layers of each layer's best of several rounds, so that
other work on the machine disturbs it little; a round passes all layers, so that no layer finds its data in a cache.
"""

import argparse
import functools
import itertools
from collections.abc import Iterator

import torch

from disagg.cache.layout import KvDtype, KvLayout
from disagg.engine.benchmark.peaks import best_time_s, measure_peaks
from disagg.engine.kernels.interface import KernelBackend, StepBatch
from disagg.engine.kernels.select import BACKENDS, select_backend

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, NUM_LAYERS = 9, 3, 64, 30
HIDDEN, INTERMEDIATE = 576, 1536
DTYPE = torch.bfloat16


def make_batch(contexts: list[int], new_tokens: int, block_size: int, scattered: bool = True) -> tuple[StepBatch, int]:
    """Return a step adding ``new_tokens`` to each sequence and the block count; blocks are in turn or scattered."""
    needed = -(-max(contexts) // block_size)
    num_blocks = needed * len(contexts)
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randperm(num_blocks, generator=generator) if scattered else torch.arange(num_blocks)
    tables = blocks.int().view(len(contexts), needed)
    num_rows = new_tokens * len(contexts)
    batch = StepBatch(
        token_ids=torch.zeros(num_rows, dtype=torch.int64),
        positions=torch.cat([torch.arange(context - new_tokens, context) for context in contexts]).int(),
        query_start=torch.arange(0, num_rows + 1, new_tokens).int(),
        context_lens=torch.tensor(contexts, dtype=torch.int32),
        block_tables=tables,
        logit_rows=torch.arange(new_tokens - 1, num_rows, new_tokens),
        max_query_len=new_tokens,
        max_context_len=max(contexts),
    )
    return batch, num_blocks


def make_pool(backend: KernelBackend, num_blocks: int, block_size: int) -> torch.Tensor:
    """Return a pool of random keys and values, [layers, blocks, 2, KV heads, block size * head dimension]."""
    layout = KvLayout(
        num_layers=NUM_LAYERS,
        num_blocks=num_blocks,
        num_kv_heads=NUM_KV_HEADS,
        block_size=block_size,
        head_dim=HEAD_DIM,
        dtype=KvDtype.BFLOAT16,
        format=backend.kv_format,
    )
    shape = (layout.num_layers, layout.num_blocks, 2, layout.num_kv_heads, layout.block_size * layout.head_dim)
    return torch.empty(shape, dtype=DTYPE).normal_()


def attention_time_s(backend: KernelBackend, batch: StepBatch, pool: torch.Tensor) -> float:
    """Return the time of attention over all layers."""
    q = torch.randn((len(batch.token_ids), NUM_HEADS, HEAD_DIM)).to(DTYPE)
    scale = HEAD_DIM**-0.5
    layers = [functools.partial(backend.attention, q, layer, batch, scale, None) for layer in pool]
    return best_time_s(layers, at_most_s=0.5)


def decode_rows(backend: KernelBackend, bandwidth: float, quick: bool) -> Iterator[str]:
    """Yield one line per block size, batch and context: bytes per second, with blocks in turn and scattered."""
    cases = itertools.product((32, 64), (1, 32) if quick else (1, 4, 16, 32), (1024,) if quick else (256, 1024, 4096))
    for block_size, size, context in cases:
        if size * context > 64 << 10:
            continue
        read_bytes = NUM_LAYERS * size * context * 2 * NUM_KV_HEADS * HEAD_DIM * DTYPE.itemsize
        columns = []
        for scattered in (False, True):
            batch, num_blocks = make_batch([context] * size, 1, block_size, scattered)
            elapsed_s = attention_time_s(backend, batch, make_pool(backend, num_blocks, block_size))
            rate = read_bytes / elapsed_s
            order = "scattered" if scattered else "in turn"
            columns.append(f"{order} {elapsed_s * 1e3:7.2f} ms {rate / 1e9:5.1f} GB/s = {rate / bandwidth:4.2f}")
        yield f"decode   block {block_size} batch {size:2} context {context:4}: {'; '.join(columns)} of read bandwidth"


def prefill_rows(backend: KernelBackend, peak: float, quick: bool) -> Iterator[str]:
    """Yield one line per prompt length and cached prefix: time, flop per second (causal half), share of the peak."""
    cases = ((512, 0),) if quick else ((128, 0), (512, 0), (1024, 0), (2048, 0), (512, 1536))
    for new_tokens, prefix in cases:
        batch, num_blocks = make_batch([prefix + new_tokens], new_tokens, 32)
        elapsed_s = attention_time_s(backend, batch, make_pool(backend, num_blocks, 32))
        pairs = new_tokens * prefix + new_tokens * (new_tokens + 1) // 2
        rate = NUM_LAYERS * 4 * NUM_HEADS * HEAD_DIM * pairs / elapsed_s
        yield (
            f"prefill  {new_tokens:5} tokens after {prefix:5}: {elapsed_s * 1e3:8.2f} ms "
            f"{rate / 1e9:7.1f} GFLOP/s  {rate / peak:5.2f} of GEMM peak"
        )


def linear_rows(backend: KernelBackend, bandwidth: float, peak: float, quick: bool) -> Iterator[str]:
    """Yield one line per number of rows: time of the four matrix products of every layer, share of the higher floor."""
    heads = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    shapes = ((heads, HIDDEN), (HIDDEN, HIDDEN), (2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
    matrices = [torch.randn(shape).to(DTYPE) for _ in range(NUM_LAYERS) for shape in shapes]
    linears = [(backend.linear(matrix, None), matrix.shape[1]) for matrix in matrices]
    weights = sum(matrix.numel() for matrix in matrices)
    for rows in (1, 512) if quick else (1, 4, 8, 16, 32, 64, 512, 2048):
        inputs = {width: torch.randn(rows, width).to(DTYPE) for width in (HIDDEN, INTERMEDIATE)}
        elapsed_s = best_time_s([functools.partial(linear, inputs[width]) for linear, width in linears])
        memory_s, compute_s = weights * DTYPE.itemsize / bandwidth, 2 * rows * weights / peak
        floor = "memory" if memory_s > compute_s else "compute"
        yield (
            f"linears  {rows:5} rows: {elapsed_s * 1e3:8.2f} ms "
            f"{max(memory_s, compute_s) / elapsed_s:5.2f} of the {floor} floor"
        )


def main() -> None:
    """Print both limits and each kernel's share of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--backend", choices=BACKENDS, nargs="+", default=["native"])
    parser.add_argument("--quick", action="store_true", help="one context and prompt length each")
    args = parser.parse_args()
    torch.manual_seed(0)
    for threads in args.threads:
        torch.set_num_threads(threads)
        peaks = measure_peaks(select_backend(torch.device("cpu"), DTYPE), DTYPE)
        bandwidth, peak = peaks.read_bandwidth, peaks.gemm_flops
        print(f"{threads} threads: reads {bandwidth / 1e9:.1f} GB/s, bf16 GEMM {peak / 1e9:.0f} GFLOP/s")
        for name in args.backend:
            backend = select_backend(torch.device("cpu"), DTYPE, name)
            print(f"backend {name}")
            for line in itertools.chain(
                decode_rows(backend, bandwidth, args.quick),
                prefill_rows(backend, peak, args.quick),
                linear_rows(backend, bandwidth, peak, args.quick),
            ):
                print(line, flush=True)


if __name__ == "__main__":
    main()
