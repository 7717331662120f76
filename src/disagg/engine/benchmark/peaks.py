"""What this machine can do at best, measured with the threads that the engine uses."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from disagg.engine.kernels.interface import KernelBackend

_READ_BYTES: Final = 512 << 20
"""Far larger than the last-level cache."""
_GEMM_SIZE: Final = 1024


@dataclass(frozen=True, slots=True)
class MachinePeaks:
    """Bytes per second of reading memory, and floating-point operations per second of a matrix product."""

    read_bandwidth: float
    gemm_flops: float


def best_time_s(pieces: Sequence[Callable[[], object]], at_most_s: float = 1.0) -> float:
    """Return the sum of the shortest times that each of ``pieces`` took, run in turn, in 3 to 30 rounds."""
    best = [math.inf] * len(pieces)
    started = time.perf_counter()
    for number in range(30):
        for index, piece in enumerate(pieces):
            start = time.perf_counter()
            piece()
            best[index] = min(best[index], time.perf_counter() - start)
        if number >= 2 and time.perf_counter() - started > at_most_s:
            break
    return sum(best)


def measure_peaks(backend: KernelBackend, dtype: torch.dtype) -> MachinePeaks:
    """Measure both limits, the matrix product through the backend's own packed weights."""
    data = torch.zeros(_READ_BYTES // 4, dtype=torch.float32)
    read_bandwidth = data.nbytes / best_time_s([part.sum for part in data.chunk(32)])
    linear = backend.linear(torch.randn(_GEMM_SIZE, _GEMM_SIZE).to(dtype), None)
    x = torch.randn(_GEMM_SIZE, _GEMM_SIZE).to(dtype)
    return MachinePeaks(read_bandwidth, 2 * _GEMM_SIZE**3 / best_time_s([lambda: linear(x)]))
