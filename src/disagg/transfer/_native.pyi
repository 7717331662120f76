import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

def copy_blocks(
    source: Buffer, starts: NDArray[np.int64], target: Buffer, ends: NDArray[np.int64], size: int
) -> None: ...

class Int8Blocks:
    def __init__(self, element: str, heads: int, k: tuple[int, int, int], v: tuple[int, int, int]) -> None: ...
    def encode(self, source: Buffer, starts: NDArray[np.int64], target: Buffer, ends: NDArray[np.int64]) -> None: ...
    def decode(self, source: Buffer, starts: NDArray[np.int64], target: Buffer, ends: NDArray[np.int64]) -> None: ...

class FormConverter:
    def __init__(
        self, source: tuple[str, bool], target: tuple[str, bool], heads: int, tokens: tuple[int, int], channels: int
    ) -> None: ...
    def convert(
        self,
        source: Buffer,
        starts: NDArray[np.int64],
        target: Buffer,
        ends: NDArray[np.int64],
        parts: NDArray[np.int64],
    ) -> None: ...
