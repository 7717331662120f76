"""From the bytes of a GGUF tensor to ``BlockWeight``: the same integers and scales, one value in each place.

Layouts are those of llama.cpp (``ggml-common.h``, ``ggml-quants.c``), as the ``gguf`` package reads them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from disagg.engine.kernels.blocks import SUPER_BLOCK, BlockFormat, BlockWeight

Bytes = npt.NDArray[np.uint8]

BLOCK_FORMATS: Final = {
    GGMLQuantizationType.Q8_0: BlockFormat.BYTES32,
    GGMLQuantizationType.Q5_0: BlockFormat.BYTES32,
    GGMLQuantizationType.Q5_1: BlockFormat.BYTES32_OFFSET,
    GGMLQuantizationType.Q5_K: BlockFormat.BYTES32_SUB_OFFSET,
    GGMLQuantizationType.Q6_K: BlockFormat.BYTES16_SUB,
    GGMLQuantizationType.Q4_0: BlockFormat.NIBBLES32_OFFSET,
    GGMLQuantizationType.Q4_1: BlockFormat.NIBBLES32_OFFSET,
    GGMLQuantizationType.Q4_K: BlockFormat.NIBBLES32_SUB_OFFSET,
}
"""The quantisations whose blocks can be kept; all others are dequantised."""


def read_blocks(stored: Bytes, quantization: GGMLQuantizationType, num_rows: int) -> BlockWeight:
    """Return a matrix of ``num_rows`` rows from its bytes, one of BLOCK_FORMATS."""
    blocks = stored.reshape(-1, GGML_QUANT_SIZES[quantization][1])
    parts = _READERS[quantization](blocks)

    def rows(part: npt.NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(np.array(part).reshape(num_rows, -1))

    return BlockWeight(
        BLOCK_FORMATS[quantization],
        rows(parts.values),
        rows(parts.scale),
        *(None if part is None else rows(part) for part in (parts.offset, parts.sub_scale, parts.sub_offset)),
    )


@dataclass(frozen=True, slots=True)
class _Parts:
    """The arrays of a ``BlockWeight``, one row for each block of the file."""

    values: npt.NDArray[np.int8]
    scale: npt.NDArray[np.float16]
    offset: npt.NDArray[np.float16] | None = None
    sub_scale: npt.NDArray[np.int8] | None = None
    sub_offset: npt.NDArray[np.int8] | None = None


def _half(blocks: Bytes, at: int) -> npt.NDArray[np.float16]:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16)


def _halves_of_bytes(packed: Bytes) -> Bytes:
    """Low halves of a run of bytes, then their high halves: [blocks, runs, bytes] to [blocks, runs * 2 * bytes]."""
    return np.stack((packed & 15, packed >> 4), axis=2).reshape(len(packed), -1)


def _fifth_bits(blocks: Bytes, at: int) -> Bytes:
    return np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little") << np.uint8(4)


def _q8_0(blocks: Bytes) -> _Parts:
    return _Parts(blocks[:, 2:].view(np.int8), _half(blocks, 0))


def _q4_0(blocks: Bytes) -> _Parts:
    scale = _half(blocks, 0)
    return _Parts(_halves_of_bytes(blocks[:, None, 2:]).view(np.int8), scale, scale * np.float16(8))


def _q4_1(blocks: Bytes) -> _Parts:
    return _Parts(_halves_of_bytes(blocks[:, None, 4:]).view(np.int8), _half(blocks, 0), -_half(blocks, 2))


def _q5_0(blocks: Bytes) -> _Parts:
    values = _halves_of_bytes(blocks[:, None, 6:]) | _fifth_bits(blocks, 2)
    return _Parts(values.view(np.int8) - np.int8(16), _half(blocks, 0))


def _q5_1(blocks: Bytes) -> _Parts:
    values = _halves_of_bytes(blocks[:, None, 8:]) | _fifth_bits(blocks, 4)
    return _Parts(values.view(np.int8), _half(blocks, 0), -_half(blocks, 2))


def _q4_k(blocks: Bytes) -> _Parts:
    values = _halves_of_bytes(blocks[:, 16:].reshape(len(blocks), -1, 32))
    return _Parts(values.view(np.int8), _half(blocks, 0), _half(blocks, 2), *_six_bit_factors(blocks[:, 4:16]))


def _q5_k(blocks: Bytes) -> _Parts:
    low = _halves_of_bytes(blocks[:, 48:].reshape(len(blocks), -1, 32))
    shifts = np.arange(8, dtype=np.uint8)[:, None]
    high = (blocks[:, None, 16:48] >> shifts & 1).reshape(len(blocks), -1) << 4
    values = (low | high).view(np.int8)
    return _Parts(values, _half(blocks, 0), _half(blocks, 2), *_six_bit_factors(blocks[:, 4:16]))


def _q6_k(blocks: Bytes) -> _Parts:
    low = _halves_of_bytes(blocks[:, :128].reshape(len(blocks), -1, 64))
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
    high = (blocks[:, 128:192].reshape(len(blocks), -1, 1, 32) >> shifts & 3).reshape(len(blocks), SUPER_BLOCK) << 4
    values = (low | high).view(np.int8) - np.int8(32)
    return _Parts(values, _half(blocks, 208), sub_scale=blocks[:, 192:208].view(np.int8))


def _six_bit_factors(packed: Bytes) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int8]]:
    """Return eight factors of scales and eight of offsets out of 12 bytes."""
    first, second, mixed = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate((first & 63, mixed & 15 | first >> 2 & 48), axis=1)
    offsets = np.concatenate((second & 63, mixed >> 4 | second >> 2 & 48), axis=1)
    return scales.view(np.int8), offsets.view(np.int8)


_READERS: Final[dict[GGMLQuantizationType, Callable[[Bytes], _Parts]]] = {
    GGMLQuantizationType.Q8_0: _q8_0,
    GGMLQuantizationType.Q4_0: _q4_0,
    GGMLQuantizationType.Q4_1: _q4_1,
    GGMLQuantizationType.Q5_0: _q5_0,
    GGMLQuantizationType.Q5_1: _q5_1,
    GGMLQuantizationType.Q4_K: _q4_k,
    GGMLQuantizationType.Q5_K: _q5_k,
    GGMLQuantizationType.Q6_K: _q6_k,
}
