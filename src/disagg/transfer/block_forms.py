"""KV blocks of one pool as blocks of another that differs in element type or in the order of the elements.

So a prefill instance with one kind of kernels, or one precision, feeds a decode instance with another. What travels is
the source's own form, which its address declares; the reader converts. Compiled code does it where there is some.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from disagg.base.errors import TransferError
from disagg.base.ids import BlockId
from disagg.cache.layout import KvFormat, KvLayout
from disagg.transfer.digests import bad_blocks
from disagg.transfer.element_types import from_float, to_float
from disagg.transfer.pool import KvPool

try:
    from disagg.transfer import _native
except ImportError:  # no compiler was there at installation
    _native = None  # type: ignore[assignment]

_CONVERTIBLE: Final = ("num_blocks", "dtype", "format")
"""In what the layouts of two pools may differ."""
_SAME: Final = {
    "block_size": "block size: blocks are offered, named in caches and checked as wholes, so none is made of parts of "
    "others"
}
"""What both ends must be started with, where that is not simply the model."""


def check_convertible(remote: KvLayout, local: KvLayout) -> None:
    """Raise TransferError, naming the field, unless blocks of one layout can be made of blocks of the other."""
    for name in local.__struct_fields__:
        theirs, ours = getattr(remote, name), getattr(local, name)
        if name not in _CONVERTIBLE and theirs != ours:
            raise TransferError(
                f"KV layouts differ in {name}: the peer has {theirs}, this instance {ours}; "
                f"start both with the same {_SAME.get(name, 'model')}"
            )


class BlockForms:
    """Converts layers of blocks from the form of one layout to that of another."""

    def __init__(self, source: KvLayout, target: KvLayout, *, native: bool = True) -> None:
        """Raises TransferError for layouts that differ in more than form."""
        check_convertible(source, target)
        self._source = source
        self._target = target
        self._native = _make_native(source, target) if native else None

    @property
    def is_same(self) -> bool:
        """True when there is nothing to convert."""
        return (self._source.dtype, self._source.format) == (self._target.dtype, self._target.format)

    @property
    def is_native(self) -> bool:
        """True where compiled code does the work."""
        return self._native is not None

    def describe(self) -> str:
        """Return in words what is made of what."""
        source, target = self._source, self._target
        return f"{source.dtype.value} {source.format.value} to {target.dtype.value} {target.format.value}"

    def convert(
        self, source: memoryview, starts: Sequence[int], target: memoryview, layers: range, blocks: Sequence[BlockId]
    ) -> None:
        """Make ``blocks`` of the target, layer by layer, of what lies at ``starts`` (bytes, [layer, block])."""
        ends = [self._target.offset(layer, block) for layer in layers for block in blocks]
        if self._native is not None:
            self._native.convert(source, np.array(starts, np.int64), target, np.array(ends, np.int64))
            return
        for start, end in zip(starts, ends, strict=True):
            raw = np.frombuffer(source, np.uint8, self._source.layer_block_bytes, start)
            target[end : end + self._target.layer_block_bytes] = self._convert_one(raw).data

    def _convert_one(self, raw: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return one layer of one block in the other form."""
        layout = self._source
        kinds = to_float(raw, layout.dtype).reshape(2, layout.num_kv_heads, -1)
        in_order = [_token_major(kind, layout, is_key=index == 0) for index, kind in enumerate(kinds)]
        ordered = [_in_format(kind, self._target, is_key=index == 0) for index, kind in enumerate(in_order)]
        return from_float(np.concatenate(ordered), self._target.dtype)


class ConvertedBlocks:
    """Takes over groups of blocks that come in the form of another pool: layer by layer, as they lie there."""

    def __init__(self, forms: BlockForms, remote: KvLayout, pool: KvPool, layers: range) -> None:
        self._forms = forms
        self.remote = remote
        self._pool = pool
        self._layers = layers
        self._buffer = bytearray()

    def room_for(self, num_blocks: int) -> memoryview:
        """Return the memory for a group's bytes. The next call reuses it."""
        num_bytes = num_blocks * len(self._layers) * self.remote.layer_block_bytes
        if len(self._buffer) < num_bytes:
            self._buffer = bytearray(num_bytes)
        return memoryview(self._buffer)[:num_bytes]

    def take(self, room: memoryview, blocks: Sequence[BlockId], digests: Sequence[bytes]) -> list[int]:
        """Convert a group into the pool; return the places in ``blocks`` of those that came with a wrong digest."""
        size = self.remote.layer_block_bytes
        starts = [index * size for index in range(len(blocks) * len(self._layers))]
        self._forms.convert(room, starts, self._pool.data, self._layers, blocks)
        came = np.frombuffer(room, np.uint8).reshape(len(self._layers), len(blocks), size)
        return bad_blocks(came, range(len(blocks)), digests)


def _token_major(heads: NDArray[np.float32], layout: KvLayout, *, is_key: bool) -> NDArray[np.float32]:
    """Return [heads, tokens, channels] of one kind's [heads, elements]."""
    size, dim = layout.block_size, layout.head_dim
    if layout.format is KvFormat.TOKEN_MAJOR:
        return heads.reshape(-1, size, dim)
    lanes = 4 // layout.dtype.itemsize
    if is_key:
        return heads.reshape(-1, dim // lanes, size, lanes).transpose(0, 2, 1, 3).reshape(-1, size, dim)
    return heads.reshape(-1, size // lanes, dim, lanes).transpose(0, 1, 3, 2).reshape(-1, size, dim)


def _in_format(heads: NDArray[np.float32], layout: KvLayout, *, is_key: bool) -> NDArray[np.float32]:
    """Return the elements of one kind's [heads, tokens, channels] in the order of a pool."""
    size, dim = layout.block_size, layout.head_dim
    if layout.format is KvFormat.TOKEN_MAJOR:
        return heads.reshape(-1)
    lanes = 4 // layout.dtype.itemsize
    if is_key:
        return heads.reshape(-1, size, dim // lanes, lanes).transpose(0, 2, 1, 3).reshape(-1)
    return heads.reshape(-1, size // lanes, lanes, dim).transpose(0, 1, 3, 2).reshape(-1)


def _make_native(source: KvLayout, target: KvLayout) -> Any:
    """Return compiled code for these forms, or None where there is none."""
    native: Any = _native
    if native is None:
        return None
    one, other = ((layout.dtype.value, layout.format is KvFormat.INTERLEAVED) for layout in (source, target))
    try:
        return native.FormConverter(one, other, source.num_kv_heads, source.block_size, source.head_dim)
    except ValueError:  # odd numbers of tokens or channels
        return None
