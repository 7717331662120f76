"""KV blocks as files: one a block, named by its digest, in a folder that belongs to one instance, model and layout.

A file is a header of a page and the block, layer after layer. It is written under another name first, so it is there
as a whole or not at all. A file that is torn, changed or of another model or layout is never read as a block: length,
header and digest say so. Durability is not promised: what a power cut tears is found out and computed again.
"""

import errno
import fcntl
import hashlib
import os
import shutil
import struct
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from disagg.base.errors import ConfigurationError, TransferError
from disagg.base.ids import BlockHash
from disagg.cache.layout import KvLayout

FORMAT_VERSION: Final = 1
HEADER_BYTES: Final = 4096
SUFFIX: Final = ".kv"
MIN_FREE_BYTES: Final = 1 << 30
"""What is left free on the disk for others, whatever SIZE says."""
_HEADER: Final = struct.Struct("<8sI32s64sQ32s")
_MAGIC: Final = b"DISAGGKB"

BlockData = NDArray[np.unsignedinteger[Any]]
"""One block as [layer, words]."""


class BlockFiles:
    """The files of one instance. Methods may be called from several threads, for different blocks.

    ``model`` is the fingerprint of the model that the blocks are of. Raises ConfigurationError when the folder cannot
    be used, or is used by another server.
    """

    def __init__(self, folder: Path, instance: str, model: bytes, layout: KvLayout) -> None:
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

    @property
    def file_bytes(self) -> int:
        """Bytes of one block's file."""
        return HEADER_BYTES + self._num_bytes

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
        data = np.ascontiguousarray(block)
        unfinished = path.with_suffix(".tmp")
        try:
            with unfinished.open("wb", buffering=0) as file:
                file.write(self._header(name, hashlib.sha256(data.data).digest()))
                _write_all(file.fileno(), data.data.cast("B"))
            unfinished.replace(path)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise

    def read(self, name: BlockHash, block: BlockData) -> None:
        """Read a block into ``block``, which is as it was when TransferError says why that cannot be."""
        data = np.empty(block.shape, dtype=block.dtype)
        try:
            with self._path(name).open("rb", buffering=0) as file:
                header = file.read(HEADER_BYTES)
                num_read = _read_all(file.fileno(), data.data.cast("B"))
                is_longer = bool(file.read(1))
        except OSError as error:
            raise TransferError(f"the block {name.hex()} cannot be read from disk: {error}") from error
        if num_read != self._num_bytes or is_longer:
            raise TransferError(f"the file of block {name.hex()} is of another length")
        if header != self._header(name, hashlib.sha256(data.data).digest()):
            raise TransferError(f"the file of block {name.hex()} is damaged, or of another model")
        np.copyto(block, data)

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


def _write_all(file: int, data: memoryview) -> None:
    while data:
        data = data[os.write(file, data) :]


def _read_all(file: int, data: memoryview) -> int:
    """Fill ``data`` as far as the file reaches; return the bytes read."""
    num_read = 0
    while num_read < len(data) and (count := os.readv(file, [data[num_read:]])):
        num_read += count
    return num_read
