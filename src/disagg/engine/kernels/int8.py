"""Weight-only int8: a weight matrix as bytes and one scale per output feature; activations keep their element type."""

from dataclasses import dataclass
from typing import Final

import torch
from torch.nn import functional

_LARGEST: Final = 127


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """``values`` int8 [out_features, in_features] times ``scale`` float32 [out_features]."""

    values: torch.Tensor
    scale: torch.Tensor


def quantize_int8(weight: torch.Tensor) -> Int8Weight:
    """Round each row of ``weight`` [out_features, in_features] to 255 equal steps about 0, up to its largest value."""
    wide = weight.float()
    scale = wide.abs().amax(dim=1) / _LARGEST
    # A row of zeros has any scale.
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return Int8Weight((wide / scale[:, None]).round_().to(torch.int8), scale)


def int8_product(x: torch.Tensor, weight: Int8Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x times the transposed weight, plus the bias; computed in float32 and rounded once."""
    product = functional.linear(x.float(), weight.values.float()) * weight.scale
    return (product if bias is None else product + bias.float()).to(x.dtype)
