"""The memory of a KV pool, shared with the other instances of this host.

A pool is a ``memfd``: an anonymous file that exists while somebody has it open or mapped, so that nothing has to be
cleaned up, however its owner ends. One header page comes first, then the blocks as ``KvLayout`` orders them. The file
is sealed: nobody can change its size (a reader never meets SIGBUS) and nobody but its owner can map it writable.
"""

import ctypes
import errno
import fcntl
import hashlib
import mmap
import os
import struct
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from disagg.base.errors import ConfigurationError
from disagg.cache.layout import KvLayout
from disagg.transfer.address import ADDRESS_VERSION, AnyWay, PoolAddress, ShmWay
from disagg.transfer.step_progress import StepProgress

HEADER_BYTES: Final = mmap.PAGESIZE
FILE_NAME: Final = "disagg-kv"
F_SEAL_FUTURE_WRITE: Final = 0x10  # not in Python's fcntl module before 3.13
SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL | F_SEAL_FUTURE_WRITE
_MADV_POPULATE_WRITE: Final = 23
_HEADER: Final = struct.Struct("<8sI4x32s32sQ")
_MAGIC: Final = b"DISAGGKV"

Blocks = NDArray[np.unsignedinteger[Any]]
"""A pool as ``[layer, block, words]``."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def file_bytes(layout: KvLayout) -> int:
    """Return the size of a pool's file."""
    return HEADER_BYTES + layout.total_bytes


def header(layout: KvLayout, incarnation: str) -> bytes:
    """Return the first bytes of the file of a living pool."""
    digest = hashlib.sha256(msgspec.msgpack.encode(layout)).digest()
    return _HEADER.pack(_MAGIC, ADDRESS_VERSION, incarnation.encode(), digest, layout.total_bytes)


def view_blocks(file: mmap.mmap, layout: KvLayout) -> Blocks:
    """View a mapped pool in the widest words that one layer of a block consists of."""
    word: np.dtype[np.unsignedinteger[Any]] = np.dtype(np.uint32 if layout.layer_block_bytes % 8 else np.uint64)
    flat = np.frombuffer(file, dtype=word, count=layout.total_bytes // word.itemsize, offset=HEADER_BYTES)
    return flat.reshape(layout.num_layers, layout.num_blocks, -1)


def populate(blocks: Blocks, layout: KvLayout, part: tuple[int, int, int], advice: int) -> str:
    """Let the kernel map ``part`` (layer, first block, number of blocks) of a pool; return why it could not, or ""."""
    layer, first_block, num_blocks = part
    start = HEADER_BYTES + layout.offset(layer, first_block)
    end = start + num_blocks * layout.layer_block_bytes
    start -= start % mmap.PAGESIZE
    base = blocks.ctypes.data - HEADER_BYTES
    # EINVAL: a kernel before 5.14, where the first access to each page does the same, only later.
    if _libc.madvise(base + start, end - start, advice) and ctypes.get_errno() != errno.EINVAL:
        return os.strerror(ctypes.get_errno())
    return ""


class KvPool:
    """This instance's own pool. Views of it (``data``, ``blocks``) stay valid as long as they are held.

    The memory is zero and not touched yet: see ``touch``. Raises ConfigurationError when the system refuses it.
    """

    def __init__(self, layout: KvLayout, incarnation: str) -> None:
        self.layout = layout
        self.incarnation = incarnation
        self._fd = os.memfd_create(FILE_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._fd, file_bytes(layout))
            self._file = mmap.mmap(self._fd, file_bytes(layout), mmap.MAP_SHARED)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, SEALS)
        except (OSError, OverflowError, ValueError) as error:
            os.close(self._fd)
            raise ConfigurationError(
                f"cannot take {layout.total_bytes} bytes of shared memory for the KV pool ({error}): lower --kv-memory"
            ) from error
        self._file[: _HEADER.size] = header(layout, incarnation)
        self.blocks = view_blocks(self._file, layout)
        """Writable."""
        self.progress = StepProgress(memoryview(self._file)[:HEADER_BYTES], self.start)

    @property
    def data(self) -> memoryview:
        """The bytes after the header, writable."""
        return memoryview(self._file)[HEADER_BYTES:]

    @property
    def start(self) -> int:
        """Where the pool's file, header and all, begins in this process's memory."""
        return int(self.blocks.ctypes.data) - HEADER_BYTES

    @property
    def shm_way(self) -> ShmWay:
        """How a peer on this host opens the pool."""
        return ShmWay(pid=os.getpid(), fd=self._fd)

    def address(self, *ways: AnyWay) -> PoolAddress:
        """Return what a peer needs to read the pool: over shared memory, or in these ways, best first."""
        return PoolAddress(
            version=ADDRESS_VERSION,
            incarnation=self.incarnation,
            layout=self.layout,
            ways=ways or (self.shm_way,),
        )

    def touch(self, layer: int, first_block: int, num_blocks: int) -> None:
        """Let the kernel provide the memory of some blocks of one layer now; their contents do not change.

        It may run beside a step. Raises ConfigurationError when the system has no memory left.
        """
        failure = populate(self.blocks, self.layout, (layer, first_block, num_blocks), _MADV_POPULATE_WRITE)
        if failure:
            raise ConfigurationError(f"no memory left for the KV pool ({failure}): lower --kv-memory")

    def close(self) -> None:
        """End the pool: a peer that still maps it sees that it is no longer valid. A second call does nothing."""
        if self._fd >= 0:
            self._file[: _HEADER.size] = bytes(_HEADER.size)
            os.close(self._fd)
            self._fd = -1
