"""Measuring the forward pass: the real decoder and weights over a scratch KV pool."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import torch

from disagg.base.config import DType, Quantization
from disagg.cache.layout import KvDtype, KvFormat, KvLayout
from disagg.engine.benchmark.cases import ElementSizes, StepCase, StepTime, with_floors
from disagg.engine.benchmark.peaks import MachinePeaks, measure_peaks
from disagg.engine.kernels.interface import KernelBackend, StepBatch
from disagg.engine.kernels.select import select_backend
from disagg.engine.kernels.torch_backend import TorchBackend
from disagg.engine.model.decoder import Decoder
from disagg.engine.model.sampler import chooser_of, most_likely
from disagg.engine.model.weights import TORCH_DTYPES, load_weights
from disagg.models.config import ModelConfig
from disagg.models.locate import ModelFiles, load_config

_MIN_ROUNDS: Final = 5
_MEASURE_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class EngineBenchmark:
    """One model on one number of threads, ready to be measured."""

    name: str
    config: ModelConfig
    decoder: Decoder
    backend: KernelBackend
    dtype: torch.dtype
    block_size: int
    peaks: MachinePeaks
    sizes: ElementSizes
    weight_bytes: int

    def measure(self, cases: list[StepCase]) -> Iterator[StepTime]:
        """Yield each case's median step time beside its floors."""
        chooser = chooser_of(self.backend)
        pool = self.make_pool(max(case.batch * -(-case.context // self.block_size) for case in cases))
        for case in cases:
            batch = make_batch(case, self.block_size)

            def step(batch: StepBatch = batch) -> None:
                most_likely(self.decoder.forward(batch, pool), chooser)

            yield with_floors(case, _median_s(step), self.config, self.peaks, self.sizes)

    def make_pool(self, num_blocks: int) -> torch.Tensor:
        """Return a scratch KV pool of noise: [num_layers, num_blocks, 2, Hk, block_size * D]."""
        layout = self.layout(num_blocks)
        elements = layout.block_size * layout.head_dim
        shape = (layout.num_layers, layout.num_blocks, 2, layout.num_kv_heads, elements)
        return torch.empty(shape, dtype=self.dtype).normal_()

    def layout(self, num_blocks: int) -> KvLayout:
        """Return the layout of such a pool."""
        return KvLayout(
            num_layers=self.config.num_layers,
            num_blocks=num_blocks,
            num_kv_heads=self.config.num_kv_heads,
            block_size=self.block_size,
            head_dim=self.config.head_dim,
            dtype=KvDtype(str(self.dtype).removeprefix("torch.")),
            format=self.backend.kv_format,
        )


def prepare(
    files: ModelFiles,
    *,
    dtype: DType,
    quantization: Quantization | None = None,
    num_threads: int,
    block_size: int,
    kernel_backend: str | None = None,
    kv_format: KvFormat | None = None,
    progress: Callable[[float], None] | None = None,
) -> EngineBenchmark:
    """Load a model and measure what the machine can do. Raises ConfigurationError when the model cannot be run.

    With ``kv_format`` the PyTorch kernels compute over such a pool.
    """
    torch.set_num_threads(num_threads)
    config = load_config(files)
    torch_dtype = TORCH_DTYPES[dtype]
    backend: KernelBackend
    if kv_format is None:
        backend = select_backend(torch.device("cpu"), torch_dtype, kernel_backend)
    else:
        backend = TorchBackend(kv_format)
    weights = load_weights(files, config, backend, dtype=dtype, quantization=quantization, progress=progress)
    decoder = Decoder(config, weights, backend)
    peaks = measure_peaks(backend, torch_dtype)
    element_bytes = torch_dtype.itemsize
    matrix_bytes = {
        None: element_bytes,
        Quantization.INT8: 1,
        # The embeddings are looked up; a tied head is a matrix of its own.
        Quantization.GGUF: (weights.num_bytes - weights.embeddings.nbytes) / config.num_linear_parameters,
    }
    sizes = ElementSizes(matrix_bytes[quantization], element_bytes)
    return EngineBenchmark(
        files.name, config, decoder, backend, torch_dtype, block_size, peaks, sizes, weights.num_bytes
    )


def make_batch(case: StepCase, block_size: int) -> StepBatch:
    """Return a step in which every sequence has blocks of its own, scattered over the pool."""
    needed = -(-case.context // block_size)
    generator = torch.Generator().manual_seed(0)
    num_rows = case.new_tokens * case.batch
    return StepBatch(
        token_ids=torch.randint(0, 256, (num_rows,), generator=generator),
        positions=torch.arange(case.context - case.new_tokens, case.context).repeat(case.batch).int(),
        query_start=torch.arange(0, num_rows + 1, case.new_tokens).int(),
        context_lens=torch.full((case.batch,), case.context, dtype=torch.int32),
        block_tables=torch.randperm(case.batch * needed, generator=generator).int().view(case.batch, needed),
        logit_rows=torch.arange(case.new_tokens - 1, num_rows, case.new_tokens),
        max_query_len=case.new_tokens,
        max_context_len=case.context,
    )


def _median_s(step: Callable[[], None]) -> float:
    """Return the median time of at least ``_MIN_ROUNDS`` runs after a warm-up."""
    step()
    times: list[float] = []
    while len(times) < _MIN_ROUNDS or sum(times) < _MEASURE_S:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
