"""Elements of KV blocks as NumPy computes with them."""

import numpy as np
from numpy.typing import NDArray

from disagg.cache.layout import KvDtype


def to_float(raw: NDArray[np.uint8], dtype: KvDtype) -> NDArray[np.float32]:
    """Return the elements that these bytes are."""
    match dtype:
        case KvDtype.FLOAT32:
            return raw.view(np.float32)
        case KvDtype.FLOAT16:
            return raw.view(np.float16).astype(np.float32)
        case KvDtype.BFLOAT16:
            return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def from_float(values: NDArray[np.float32], dtype: KvDtype) -> NDArray[np.uint8]:
    """Return the bytes of elements, rounded to the nearest even where they have fewer bits."""
    match dtype:
        case KvDtype.FLOAT32:
            return values.view(np.uint8)
        case KvDtype.FLOAT16:
            with np.errstate(over="ignore"):  # what is too large becomes infinite
                return values.astype(np.float16).view(np.uint8)
        case KvDtype.BFLOAT16:
            bits = values.view(np.uint32)
            rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            return rounded.astype(np.uint16).view(np.uint8)
