"""Another instance's pool on this host, mapped for reading."""

import fcntl
import mmap
import os
import stat
from typing import Final

from disagg.base.errors import TransferError
from disagg.transfer.address import PoolAddress, ShmWay
from disagg.transfer.pool import FILE_NAME, HEADER_BYTES, SEALS, file_bytes, header, populate, view_blocks
from disagg.transfer.step_progress import StepProgress

_MADV_POPULATE_READ: Final = 22


class PeerPool:
    """A peer's pool. The mapping stays readable when the peer dies; ``check_alive`` tells when it ended by itself."""

    def __init__(self, address: PoolAddress, way: ShmWay) -> None:
        """Map the pool; raise TransferError when the peer is gone or what is there is not the pool announced."""
        self.layout = address.layout
        self.incarnation = address.incarnation
        self._header = header(address.layout, address.incarnation)
        self._file = _map(f"/proc/{way.pid}/fd/{way.fd}", file_bytes(address.layout))
        self.check_alive()
        self.blocks = view_blocks(self._file, address.layout)
        """Read-only."""
        self.data = memoryview(self._file)[HEADER_BYTES:]
        """The bytes after the header."""
        self.progress = StepProgress(memoryview(self._file)[:HEADER_BYTES])

    def check_alive(self) -> None:
        """Raise TransferError unless the mapped file still is the pool of this incarnation."""
        if self._file[: len(self._header)] != self._header:
            raise TransferError(f"the peer's KV pool (incarnation {self.incarnation}) has ended")

    def touch(self, layer: int, first_block: int, num_blocks: int) -> None:
        """Map some blocks of one layer now; it may run beside a copy. Raises TransferError when there is no memory."""
        failure = populate(self.blocks, self.layout, (layer, first_block, num_blocks), _MADV_POPULATE_READ)
        if failure:
            raise TransferError(f"no memory left to map the peer's KV pool ({failure}): lower --kv-memory")


def _map(path: str, num_bytes: int) -> mmap.mmap:
    try:
        # Never open what is not a pool: the pid may by now be that of another program.
        if not os.readlink(path).startswith(f"/memfd:{FILE_NAME}"):
            raise TransferError(f"{path} is no KV pool: the peer has been replaced by another process")
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise TransferError(f"cannot open the peer's KV pool: {error}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size != num_bytes:
            raise TransferError(f"the peer's KV pool has {status.st_size} bytes, {num_bytes} were announced")
        if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & SEALS != SEALS:
            raise TransferError("the peer's KV pool is not sealed: it could shrink while it is read")
        return mmap.mmap(descriptor, num_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
    except (OSError, ValueError, OverflowError) as error:
        raise TransferError(f"cannot map the peer's KV pool: {error}") from error
    finally:
        os.close(descriptor)
