"""KV blocks as files: one a block, named by its digest, in a folder that belongs to one instance, model and layout.

A file is a header of a page and the block, layer after layer. It is written under another name first, so it is there
as a whole or not at all. A file that is torn, changed or of another model or layout is never read as a block: length,
header and digest say so. Durability is not promised: what a power cut tears is found out and computed again.

Files are read and written past the page cache where the file system allows it: what is kept is bounded by what the
user gave, not by the memory that is free, and reads take what the disk takes. So files are whole pages long, and each
thread has a buffer of its own that begins at a page.
"""

import errno
import fcntl
import hashlib
import logging
import mmap
import os
import shutil
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from disagg.base.errors import ConfigurationError, TransferError
from disagg.base.ids import BlockHash
from disagg.cache.layout import KvLayout
from disagg.engine.kv_tiers import BlockData

FORMAT_VERSION: Final = 2
PAGE_BYTES: Final = 4096
HEADER_BYTES: Final = PAGE_BYTES
SUFFIX: Final = ".kv"
MIN_FREE_BYTES: Final = 1 << 30
"""What is left free on the disk for others, whatever SIZE says."""
logger = logging.getLogger(__name__)

_HEADER: Final = struct.Struct("<8sI32s64sQ32s")
_MAGIC: Final = b"DISAGGKB"


class BlockFiles:
    """The files of one instance. Methods may be called from several threads, for different blocks.

    ``model`` is the fingerprint of the model that the blocks are of. Raises ConfigurationError when the folder cannot
    be used, or is used by another server. ``past_page_cache`` holds where the file system allows it.
    """

    def __init__(
        self, folder: Path, instance: str, model: bytes, layout: KvLayout, *, past_page_cache: bool = True
    ) -> None:
        shape = msgspec.msgpack.encode(msgspec.structs.replace(layout, num_blocks=1))
        self._version = hashlib.sha256(bytes([FORMAT_VERSION]) + model + shape).digest()
        self._num_bytes = layout.block_bytes
        self.folder = folder / self._version.hex()[:16] / instance
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigurationError(
                f"--kv-disk {folder}: another server keeps blocks of {instance} there: choose another folder"
            ) from error
        except OSError as error:
            raise ConfigurationError(f"--kv-disk {folder}: {error}") from error
        self._remove_other_versions(folder, instance)
        self._buffers = threading.local()
        self._direct = os.O_DIRECT if past_page_cache and self._takes_direct_io() else 0
        if past_page_cache and not self._direct:
            logger.info("%s: the file system has no direct I/O: KV blocks pass through its page cache", self.folder)

    @property
    def is_direct(self) -> bool:
        """Whether files are read and written past the page cache."""
        return self._direct != 0

    @property
    def place(self) -> str:
        """Where it is, in words."""
        return str(self.folder)

    @property
    def file_bytes(self) -> int:
        """Bytes of one block's file."""
        return HEADER_BYTES + -(-self._num_bytes // PAGE_BYTES) * PAGE_BYTES

    def scan(self, max_blocks: int) -> tuple[BlockHash, ...]:
        """Return the names of the blocks that are there, those used longest ago first; what is no block is removed.

        Of more than ``max_blocks`` the oldest are removed. Contents are checked when they are read.
        """
        found: list[tuple[float, BlockHash]] = []
        for path in self.folder.glob("*/*"):
            status = path.stat()
            name = _name_of(path)
            if name is None or status.st_size != self.file_bytes:
                path.unlink(missing_ok=True)
            else:
                found.append((status.st_mtime, name))
        names = [name for _, name in sorted(found)]
        surplus = max(0, len(names) - max_blocks)
        for name in names[:surplus]:
            self.remove(name)
        return tuple(names[surplus:])

    def write(self, name: BlockHash, block: BlockData) -> None:
        """Write a block; raise OSError when it cannot be, ENOSPC before the disk is full."""
        if shutil.disk_usage(self.folder).free < MIN_FREE_BYTES + self.file_bytes:
            raise OSError(errno.ENOSPC, f"less than {MIN_FREE_BYTES >> 30} GiB would be left free")
        path = self._path(name)
        path.parent.mkdir(exist_ok=True)
        buffer = self._buffer()
        content = buffer[HEADER_BYTES : HEADER_BYTES + self._num_bytes]
        np.copyto(np.frombuffer(content, dtype=block.dtype).reshape(block.shape), block)
        buffer[:HEADER_BYTES] = self._header(name, hashlib.sha256(buffer[HEADER_BYTES:]).digest())
        unfinished = path.with_suffix(".tmp")
        try:
            with _opened(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | self._direct) as file:
                _write_all(file, buffer)
            unfinished.replace(path)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise

    def read(self, name: BlockHash, block: BlockData) -> None:
        """Read a block into ``block``, which is as it was when TransferError says why that cannot be."""
        buffer = self._buffer()
        try:
            with _opened(self._path(name), os.O_RDONLY | self._direct) as file:
                num_bytes = os.fstat(file).st_size
                num_read = _read_all(file, buffer) if num_bytes == len(buffer) else 0
        except OSError as error:
            raise TransferError(f"the block {name.hex()} cannot be read from disk: {error}") from error
        if num_read != len(buffer):
            raise TransferError(f"the file of block {name.hex()} is of another length")
        content = buffer[HEADER_BYTES : HEADER_BYTES + self._num_bytes]
        if buffer[:HEADER_BYTES] != self._header(name, hashlib.sha256(buffer[HEADER_BYTES:]).digest()):
            raise TransferError(f"the file of block {name.hex()} is damaged, or of another model")
        np.copyto(block, np.frombuffer(content, dtype=block.dtype).reshape(block.shape))

    def remove(self, name: BlockHash) -> None:
        """Remove a block's file, if it is there."""
        self._path(name).unlink(missing_ok=True)

    def touch(self, name: BlockHash) -> None:
        """Note on disk that a block was used: the order in which ``scan`` finds them."""
        try:
            os.utime(self._path(name))
        except FileNotFoundError:
            return

    def close(self) -> None:
        """Let another process use the folder. A second call does nothing."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _buffer(self) -> memoryview:
        """Return this thread's buffer for a file, which begins at a page."""
        buffer: memoryview | None = getattr(self._buffers, "whole", None)
        if buffer is None:
            buffer = self._buffers.whole = memoryview(mmap.mmap(-1, self.file_bytes))
        return buffer

    def _takes_direct_io(self) -> bool:
        probe = self.folder / "direct"
        try:
            with _opened(probe, os.O_WRONLY | os.O_CREAT | os.O_DIRECT) as file:
                os.write(file, self._buffer()[:PAGE_BYTES])
        except OSError:
            return False
        finally:
            probe.unlink(missing_ok=True)
        return True

    def _path(self, name: BlockHash) -> Path:
        text = name.hex()
        return self.folder / text[:2] / (text + SUFFIX)

    def _header(self, name: BlockHash, digest: bytes) -> bytes:
        packed = _HEADER.pack(_MAGIC, FORMAT_VERSION, self._version, name, self._num_bytes, digest)
        return packed.ljust(HEADER_BYTES, b"\0")

    def _remove_other_versions(self, folder: Path, instance: str) -> None:
        """Remove what this instance kept of other models or layouts, which it will never find again."""
        for other in folder.glob(f"[0-9a-f]*/{instance}"):
            if other == self.folder or len(other.parent.name) != 16 or not (other / "lock").is_file():
                continue
            lock = os.open(other / "lock", os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(other, ignore_errors=True)
            except BlockingIOError:
                pass  # another server's, at work
            finally:
                os.close(lock)


def _name_of(path: Path) -> BlockHash | None:
    """Return the block's name that a path stands for; None for one that is no finished file of ours."""
    if path.suffix != SUFFIX:
        return None
    try:
        name = bytes.fromhex(path.stem)
    except ValueError:
        return None
    return BlockHash(name) if path.parent.name == path.stem[:2] and 0 < len(name) <= 64 else None


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    file = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield file
    finally:
        os.close(file)


def _write_all(file: int, data: memoryview) -> None:
    while data:
        data = data[os.write(file, data) :]


def _read_all(file: int, data: memoryview) -> int:
    """Fill ``data`` as far as the file reaches; return the bytes read."""
    num_read = 0
    while num_read < len(data) and (count := os.readv(file, [data[num_read:]])):
        num_read += count
    return num_read
