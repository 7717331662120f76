"""A weight matrix in the blocks of a GGUF file: small integers, and a scale, perhaps an offset, for each block."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

import torch

SUPER_BLOCK: Final = 256
"""Integers of a row that share float16 scales where each block refines them (K-quants)."""


class BlockFormat(enum.Enum):
    """How blocks are laid out: integers of a block, their bits, whether blocks refine their scales, have offsets."""

    BYTES32 = (32, 8, False, False)
    """Q8_0, Q5_0."""
    BYTES32_OFFSET = (32, 8, False, True)
    """Q5_1."""
    BYTES32_SUB_OFFSET = (32, 8, True, True)
    """Q5_K."""
    BYTES16_SUB = (16, 8, True, False)
    """Q6_K."""
    NIBBLES32_OFFSET = (32, 4, False, True)
    """Q4_0, Q4_1."""
    NIBBLES32_SUB_OFFSET = (32, 4, True, True)
    """Q4_K."""

    def __init__(self, block_size: int, bits: int, refines: bool, has_offsets: bool) -> None:
        self.block_size = block_size
        self.bits = bits
        self.refines = refines
        self.has_offsets = has_offsets

    @property
    def scale_size(self) -> int:
        """Integers that share a float16 scale."""
        return SUPER_BLOCK if self.refines else self.block_size


@dataclass(frozen=True, slots=True)
class BlockWeight:
    """A matrix [out_features, in_features] of elements ``scale * value - offset``.

    ``values`` int8 [out_features, in_features]. ``scale`` and ``offset`` float16, one for each row and ``scale_size``
    integers of it; ``sub_scale`` and ``sub_offset`` int8, one for each block, are their factors. What the format lacks
    is None.
    """

    format: BlockFormat
    values: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None = None
    sub_scale: torch.Tensor | None = None
    sub_offset: torch.Tensor | None = None

    @classmethod
    def described(cls, kind: BlockFormat, out_features: int, in_features: int) -> Self:
        """Return one with a shape and no contents, for memory that is filled already."""

        def empty(count: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty((out_features, count), dtype=dtype, device="meta")

        scale = empty(in_features // kind.scale_size, torch.float16)
        sub_scale = empty(in_features // kind.block_size, torch.int8) if kind.refines else None
        return cls(
            kind,
            empty(in_features, torch.int8),
            scale,
            scale if kind.has_offsets else None,
            sub_scale,
            sub_scale if kind.has_offsets else None,
        )

    @classmethod
    def stacked(cls, weights: Sequence[Self]) -> Self:
        """Return weights of one format one below the other."""
        return cls._joined(weights[0].format, [weight._parts for weight in weights])

    def rows(self, index: torch.Tensor) -> Self:
        """Return these rows in this order."""
        return self._joined(self.format, [tuple(None if part is None else part[index] for part in self._parts)])

    @property
    def _parts(self) -> tuple[torch.Tensor | None, ...]:
        return self.values, self.scale, self.offset, self.sub_scale, self.sub_offset

    @classmethod
    def _joined(cls, kind: BlockFormat, weights: Sequence[tuple[torch.Tensor | None, ...]]) -> Self:
        columns = ([part for part in parts if part is not None] for parts in zip(*weights, strict=True))
        values, scale, *others = (torch.cat(parts) if parts else None for parts in columns)
        assert values is not None
        assert scale is not None
        return cls(kind, values, scale, *others)

    def dequantized(self) -> torch.Tensor:
        """Return the elements, float32 [out_features, in_features]."""
        scale = self._of_each(self.scale, self.sub_scale)
        values = self.values.float() * scale
        return values if self.offset is None else values - self._of_each(self.offset, self.sub_offset)

    def _of_each(self, scale: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
        wide = scale.float().repeat_interleave(self.format.scale_size, dim=1)
        return wide if factor is None else wide * factor.float().repeat_interleave(self.format.block_size, dim=1)
