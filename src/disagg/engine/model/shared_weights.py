"""One copy of a model's packed weights for all instances of a server on one host.

The launcher owns an anonymous file (``memfd``) and tells each instance its path. The first instance packs the weights
into it, under a lock; the others map what is there, and so does the first: a further instance costs no memory for
weights and no time to pack them. Once filled the file is sealed, so that nobody can change it. It has no name in any
directory and goes with the last process that has it, however each of them ends; the lock of one that dies while it
packs goes with it, and the next one begins anew.
"""

import fcntl
import hashlib
import logging
import mmap
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from disagg.base.clock import Clock
from disagg.engine.kernels.interface import DecoderWeights
from disagg.engine.kernels.weight_memory import PRIVATE, MappedMemory, WeightMemory
from disagg.transfer.pool import SEALS

logger = logging.getLogger(__name__)

Load = Callable[[WeightMemory], DecoderWeights]

_HEADER_BYTES: Final = mmap.PAGESIZE
_LOCK_S: Final = 120.0
"""How long to wait for another instance to pack, before weights are packed for this one alone."""
_POLL_S: Final = 0.01


def load_shared(path: str, key: str, most_bytes: int, load: Load, clock: Clock) -> DecoderWeights:
    """Return the weights that ``load`` gives, in the shared file at ``path`` where that is possible.

    ``key`` names model, types and kernels: weights of another key are not used. They take ``most_bytes`` at most. Where
    the file cannot be used, a warning says why, and the weights are this instance's own.
    """
    try:
        with _locked(path, clock) as descriptor:
            digest = hashlib.sha256(key.encode()).digest()
            found = os.pread(descriptor, len(digest), 0)
            if found != digest and not any(found):
                _fill(descriptor, digest, most_bytes, load)
                found = digest
            if found == digest:
                return load(_map(descriptor))
            logger.warning("the shared weights are not those of %s: this instance packs its own", key)
    except OSError as error:
        logger.warning("weights cannot be shared (%s): this instance packs its own", error)
    return load(PRIVATE)


@contextmanager
def _locked(path: str, clock: Clock) -> Iterator[int]:
    """Open the file; raise OSError when it is not there, or another instance has it for too long."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        deadline_s = clock.now() + _LOCK_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if clock.now() > deadline_s:
                    raise TimeoutError(f"another instance packs them for more than {_LOCK_S:g} s") from None
            time.sleep(_POLL_S)
        yield descriptor
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # a mapping has a descriptor of its own, and with it the lock
        os.close(descriptor)


def _fill(descriptor: int, digest: bytes, most_bytes: int, load: Load) -> None:
    """Pack into the file; its first bytes are written last, so that a half-filled one is never taken for whole."""
    os.ftruncate(descriptor, 0)
    os.ftruncate(descriptor, _HEADER_BYTES + most_bytes)  # pages that nobody touches take no memory
    file = mmap.mmap(descriptor, _HEADER_BYTES + most_bytes, mmap.MAP_SHARED)
    memory = MappedMemory(file, _HEADER_BYTES, is_filled=False)
    load(memory)
    size = memory.end
    del memory
    file.close()
    os.ftruncate(descriptor, size)
    os.pwrite(descriptor, digest, 0)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)


def _map(descriptor: int) -> MappedMemory:
    file = mmap.mmap(descriptor, 0, mmap.MAP_SHARED, mmap.PROT_READ)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")  # it is only read
        return MappedMemory(file, _HEADER_BYTES, is_filled=True)
