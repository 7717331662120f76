"""KV blocks of one pool as blocks of another that differs in element type, in the order of the elements or in size.

So a prefill instance with one kind of kernels, or one precision, feeds a decode instance with another. What travels is
the source's own form, which its address declares; the reader converts. Compiled code does it where there is some.
Where the blocks of one are several times as large, what is converted at once is one of the smaller ones: ``part`` says
which part of the larger one it is.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from disagg.base.block_sizes import why_not_made
from disagg.base.errors import TransferError
from disagg.base.ids import BlockId
from disagg.cache.layout import KvFormat, KvLayout
from disagg.transfer.digests import bad_blocks
from disagg.transfer.element_types import from_float, to_float
from disagg.transfer.pool import KvPool
from disagg.transfer.source_blocks import SourceBlock, targets_of

try:
    from disagg.transfer import _native
except ImportError:  # no compiler was there at installation
    _native = None  # type: ignore[assignment]

_CONVERTIBLE: Final = ("num_blocks", "dtype", "format", "block_size")
"""In what the layouts of two pools may differ."""


def check_convertible(remote: KvLayout, local: KvLayout) -> None:
    """Raise TransferError, naming the field, unless blocks of one layout can be made of blocks of the other."""
    for name in local.__struct_fields__:
        theirs, ours = getattr(remote, name), getattr(local, name)
        if name not in _CONVERTIBLE and theirs != ours:
            raise TransferError(
                f"KV layouts differ in {name}: the peer has {theirs}, this instance {ours}; start both with the same "
                "model"
            )
    if why := why_not_made(remote.block_size, local.block_size, has_windows=local.window is not None):
        raise TransferError(f"KV layouts differ in block_size: the peer's cannot be made this instance's: {why}")


class BlockForms:
    """Converts layers of blocks from the form of one layout to that of another."""

    def __init__(self, source: KvLayout, target: KvLayout, *, native: bool = True) -> None:
        """Raises TransferError for layouts that differ in more than form."""
        check_convertible(source, target)
        self._source = source
        self._target = target
        self._native = _make_native(source, target) if native else None
        self.is_same = all(getattr(source, name) == getattr(target, name) for name in ("dtype", "format", "block_size"))
        """True when there is nothing to convert."""

    @property
    def is_native(self) -> bool:
        """True where compiled code does the work."""
        return self._native is not None

    def describe(self) -> str:
        """Return in words what is made of what."""
        source, target = self._source, self._target
        words = f"{source.dtype.value} {source.format.value} to {target.dtype.value} {target.format.value}"
        sizes = f", blocks of {source.block_size} tokens to blocks of {target.block_size}"
        return words + (sizes if source.block_size != target.block_size else "")

    def convert(
        self,
        source: memoryview,
        starts: Sequence[int] | NDArray[np.int64],
        target: memoryview,
        layers: range,
        blocks: Sequence[BlockId],
        parts: Sequence[int] = (),
    ) -> None:
        """Make ``blocks`` of the target, layer by layer, of the blocks at ``starts`` (bytes, [layer, block]).

        Of blocks of unequal size the smaller one is all that is read or written, in the larger one's part of ``parts``.
        """
        firsts, ends = np.asarray(starts, np.int64), places_of(self._target, layers, blocks)
        if self.is_same and self._native is not None:
            _native.copy_blocks(source, firsts, target, ends, self._target.layer_block_bytes)
            return
        of_all = np.tile(np.array(parts or [0] * len(blocks), np.int64), len(layers))
        if self._native is not None:
            self._native.convert(source, firsts, target, ends, of_all)
            return
        for start, end, part in zip(firsts, ends, of_all, strict=True):
            raw = np.frombuffer(source, np.uint8, self._source.layer_block_bytes, start)
            made = np.frombuffer(target, np.uint8, self._target.layer_block_bytes, end)
            if self.is_same:
                np.copyto(made, raw)
            else:
                self._convert_one(raw, made, int(part))

    def _convert_one(self, raw: NDArray[np.uint8], made: NDArray[np.uint8], part: int) -> None:
        """Make one layer of one block, or a part of it, of one layer of another block, or a part of that."""
        source, target = self._source, self._target
        count = min(source.block_size, target.block_size)
        from_first = part * count if source.block_size > count else 0
        to_first = part * count if target.block_size > count else 0
        floats = to_float(raw, source.dtype).reshape(2, source.num_kv_heads, -1)
        bits = made.view(np.uint32 if target.dtype.itemsize == 4 else np.uint16).reshape(2, target.num_kv_heads, -1)
        for is_key, kind, wanted in ((True, floats[0], bits[0]), (False, floats[1], bits[1])):
            tokens = _by_token(kind, source, is_key=is_key)
            tokens = tokens.reshape(len(kind), source.block_size, -1)[:, from_first : from_first + count]
            coded = from_float(np.ascontiguousarray(tokens), target.dtype).view(bits.dtype)
            _put(wanted, coded.reshape(tokens.shape), target, to_first, is_key=is_key)


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

    def take(self, room: memoryview, blocks: Sequence[SourceBlock], digests: Sequence[bytes]) -> list[int]:
        """Convert a group into the pool; return the places in ``blocks`` of those that came with a wrong digest."""
        size = self.remote.layer_block_bytes
        places = [place for place, block in enumerate(blocks) for _ in block.pieces]
        starts = [(layer * len(blocks) + place) * size for layer in range(len(self._layers)) for place in places]
        targets, parts = targets_of(blocks)
        self._forms.convert(room, starts, self._pool.data, self._layers, targets, parts)
        came = np.frombuffer(room, np.uint8).reshape(len(self._layers), len(blocks), size)
        return bad_blocks(came, range(len(blocks)), digests)


def places_of(layout: KvLayout, layers: range, blocks: Sequence[BlockId]) -> NDArray[np.int64]:
    """Return where these blocks begin in a pool, in bytes, layer by layer."""
    of_layers = np.arange(layers.start, layers.stop, dtype=np.int64) * layout.layer_bytes
    of_blocks = np.array(blocks, np.int64) * layout.layer_block_bytes
    return (of_layers[:, None] + of_blocks).ravel()


def _by_token(heads: NDArray[Any], layout: KvLayout, *, is_key: bool) -> NDArray[Any]:
    """View one kind's [heads, elements] with the tokens before their channels; those of V in [tokens / w, w]."""
    size, dim = layout.block_size, layout.head_dim
    if layout.format is KvFormat.TOKEN_MAJOR:
        return heads.reshape(-1, size, dim)
    lanes = 4 // layout.dtype.itemsize
    if is_key:
        return heads.reshape(-1, dim // lanes, size, lanes).transpose(0, 2, 1, 3)
    return heads.reshape(-1, size // lanes, dim, lanes).transpose(0, 1, 3, 2)


def _put(heads: NDArray[Any], values: NDArray[Any], layout: KvLayout, first: int, *, is_key: bool) -> None:
    """Put [heads, tokens, channels] into one kind's [heads, elements] of a pool, from token ``first`` on."""
    by_token = _by_token(heads, layout, is_key=is_key)
    num_each = layout.block_size // by_token.shape[1]  # tokens at each place of the view
    part = by_token[:, first // num_each : (first + values.shape[1]) // num_each]
    part[:] = values.reshape(part.shape)


def _make_native(source: KvLayout, target: KvLayout) -> Any:
    """Return compiled code for these forms, or None where there is none."""
    native: Any = _native
    if native is None:
        return None
    one, other = ((layout.dtype.value, layout.format is KvFormat.INTERLEAVED) for layout in (source, target))
    try:
        sizes = (source.block_size, target.block_size)
        return native.FormConverter(one, other, source.num_kv_heads, sizes, source.head_dim)
    except ValueError:  # odd numbers of tokens or channels
        return None
