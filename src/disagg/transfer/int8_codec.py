"""KV blocks as one byte for each element: half the bytes of bfloat16 and a quarter of float32, and scales.

K gets a scale for each channel over the tokens of a block, V one for each token over its channels (as KIVI does,
section 3): keys have channels that are large for every token, and values have not. ``disagg bench kv-quality`` prints
what that costs, beside other ways to share scales.
"""

import enum
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from disagg.base.ids import BlockId
from disagg.cache.layout import KvFormat, KvLayout
from disagg.transfer.element_types import from_float, to_float

try:
    from disagg.transfer import _native
except ImportError:  # no compiler was there at installation
    _native = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_SCALE_BYTES: Final = 4
_LARGEST: Final = float(np.finfo(np.float32).max)


class ScaleOf(enum.Enum):
    """What shares a scale inside one head of one block."""

    CHANNEL = "channel"
    TOKEN = "token"


@dataclass(frozen=True, slots=True)
class Rows:
    """How the elements of one head lie: ``[outer, inner, lanes]``, with one scale for each (outer, lane)."""

    outer: int
    inner: int
    lanes: int

    @property
    def num_scales(self) -> int:
        """Of one head."""
        return self.outer * self.lanes


def rows_of(layout: KvLayout, scales: ScaleOf, *, is_key: bool) -> Rows:
    """Return the rows of K or V. Raises ValueError where the pool's order does not have them as rows.

    Interleaved pools (``KvFormat``) have K in rows of channels and V in rows of tokens, w elements side by side.
    """
    size, dim = layout.block_size, layout.head_dim
    if layout.format is KvFormat.TOKEN_MAJOR:
        return Rows(1, size, dim) if scales is ScaleOf.CHANNEL else Rows(size, dim, 1)
    lanes = 4 // layout.dtype.itemsize
    if is_key:
        if scales is ScaleOf.CHANNEL:
            return Rows(dim // lanes, size, lanes)
    elif scales is ScaleOf.TOKEN:
        return Rows(size // lanes, dim, lanes)
    raise ValueError(f"{layout.format.value} has no rows for scales of each {scales.value}")


class Int8Codec:
    """Codes blocks of one layout. A layer of a block is its bytes, K before V, then its float32 scales."""

    def __init__(
        self,
        layout: KvLayout,
        *,
        key_scales: ScaleOf = ScaleOf.CHANNEL,
        value_scales: ScaleOf = ScaleOf.TOKEN,
        native: bool = True,
    ) -> None:
        """Raises ValueError for scales that the layout's order of elements does not allow."""
        self._layout = layout
        self._rows = (rows_of(layout, key_scales, is_key=True), rows_of(layout, value_scales, is_key=False))
        num_scales = sum(rows.num_scales for rows in self._rows)
        head_elements = layout.block_size * layout.head_dim
        self.layer_bytes = layout.num_kv_heads * (2 * head_elements + _SCALE_BYTES * num_scales)
        """Of one layer of a block."""
        self._native = _make_native(layout, self._rows) if native else None

    @property
    def is_native(self) -> bool:
        """True where compiled code does the work."""
        return self._native is not None

    @cached_property
    def ratio(self) -> float:
        """Coded bytes for each byte of the pool."""
        return self.layer_bytes / self._layout.layer_block_bytes

    def encode(self, pool: memoryview, layers: range, blocks: Sequence[BlockId], coded: memoryview) -> None:
        """Code ``layers`` of ``blocks`` one after the other, each block's layers side by side, into ``coded``."""
        starts = [self._layout.offset(layer, block) for block in blocks for layer in layers]
        ends = self._coded_places(len(starts))
        if self._native is not None:
            self._native.encode(pool, np.array(starts, np.int64), coded, ends)
            return
        for start, end in zip(starts, ends.tolist(), strict=True):
            raw = np.frombuffer(pool, np.uint8, self._layout.layer_block_bytes, start)
            coded[end : end + self.layer_bytes] = self._encode_one(raw).data

    def decode(self, coded: memoryview, layers: range, blocks: Sequence[BlockId], pool: memoryview) -> None:
        """Write what ``encode`` made of other blocks of this layout into these."""
        self.decode_at(coded, [self._layout.offset(layer, block) for block in blocks for layer in layers], pool)

    def decode_at(self, coded: memoryview, starts: Sequence[int], target: memoryview) -> None:
        """Write coded layers of blocks, in their order, to these places (bytes)."""
        ends = self._coded_places(len(starts))
        if self._native is not None:
            self._native.decode(coded, ends, target, np.array(starts, np.int64))
            return
        for start, end in zip(starts, ends.tolist(), strict=True):
            raw = self._decode_one(np.frombuffer(coded, np.uint8, self.layer_bytes, end))
            target[start : start + self._layout.layer_block_bytes] = raw.data

    def _coded_places(self, count: int) -> NDArray[np.int64]:
        """Return where so many layers of blocks begin, coded one after the other."""
        return np.arange(count, dtype=np.int64) * self.layer_bytes

    # The portable form ----------------------------------------------------------------------------------------

    def _encode_one(self, raw: NDArray[np.uint8]) -> NDArray[np.uint8]:
        values = to_float(raw, self._layout.dtype).reshape(2, self._layout.num_kv_heads, -1)
        coded: list[NDArray[np.uint8]] = []
        scales: list[NDArray[np.uint8]] = []
        for rows, heads in zip(self._rows, values, strict=True):
            matrices = heads.reshape(-1, rows.outer, rows.inner, rows.lanes)
            # Of what is not finite nothing can be kept.
            bound = np.nan_to_num(np.abs(matrices), nan=_LARGEST, posinf=_LARGEST).max(axis=2, keepdims=True)
            scale = (bound / np.float32(127)).astype(np.float32)
            inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
            with np.errstate(invalid="ignore", over="ignore"):
                coded.append(np.rint(matrices * inverse).astype(np.int8).view(np.uint8).reshape(-1))
            scales.append(np.ascontiguousarray(scale).view(np.uint8).reshape(-1))
        return np.concatenate([*coded, *scales])

    def _decode_one(self, coded: NDArray[np.uint8]) -> NDArray[np.uint8]:
        layout = self._layout
        head_elements = layout.block_size * layout.head_dim
        elements = layout.num_kv_heads * head_elements
        scales = coded[2 * elements :].view(np.float32)
        found = []
        for index, rows in enumerate(self._rows):
            matrices = coded[index * elements :][:elements].view(np.int8)
            of_kind = scales[: layout.num_kv_heads * rows.num_scales]
            scales = scales[layout.num_kv_heads * rows.num_scales :]
            shape = (layout.num_kv_heads, rows.outer, rows.inner, rows.lanes)
            values = matrices.reshape(shape).astype(np.float32) * of_kind.reshape(-1, rows.outer, 1, rows.lanes)
            found.append(values.reshape(-1))
        return from_float(np.concatenate(found), layout.dtype)


def _make_native(layout: KvLayout, rows: tuple[Rows, Rows]) -> Any:
    """Return compiled code for these rows, or None where there is none."""
    native: Any = _native
    if native is None:
        return None
    k, v = ((one.outer, one.inner, one.lanes) for one in rows)
    try:
        return native.Int8Blocks(layout.dtype.value, layout.num_kv_heads, k, v)
    except ValueError:  # rows that are no multiple of 32 elements
        return None
