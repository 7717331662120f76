"""Where packed weights lie: in memory of the process, or in memory that the instances of one server share."""

import mmap
from collections.abc import Sequence
from typing import Final, Protocol

import torch

from disagg.base.errors import InternalError

_ALIGNMENT: Final = 64


class WeightMemory(Protocol):
    """Gives memory to what stays of a model. Each load must ask for the same, in the same order."""

    @property
    def is_filled(self) -> bool:
        """True when another load has left its weights here: nothing is to be read or packed.

        Weights are then described by tensors on the device ``meta``, which have a shape and no contents.
        """

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return memory for a tensor, to be filled unless ``is_filled``."""

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor as it is kept."""


class PrivateMemory:
    """A WeightMemory of this process alone."""

    is_filled = False

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """See WeightMemory."""
        return torch.empty(tuple(shape), dtype=dtype)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """See WeightMemory."""
        return tensor


PRIVATE: Final = PrivateMemory()


class CountedMemory:
    """Another WeightMemory, and the bytes of what stays in it."""

    def __init__(self, memory: WeightMemory) -> None:
        self._memory = memory
        self._sizes: dict[int, int] = {}

    @property
    def is_filled(self) -> bool:
        """See WeightMemory."""
        return self._memory.is_filled

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, each counted once."""
        return sum(self._sizes.values())

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """See WeightMemory."""
        return self._counted(self._memory.empty(shape, dtype))

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """See WeightMemory."""
        return self._counted(self._memory.keep(tensor))

    def _counted(self, tensor: torch.Tensor) -> torch.Tensor:
        self._sizes[tensor.data_ptr()] = tensor.nbytes
        return tensor


class MappedMemory:
    """A WeightMemory in a mapped file, from ``start`` on."""

    def __init__(self, file: mmap.mmap, start: int, *, is_filled: bool) -> None:
        self.is_filled = is_filled
        self._bytes = torch.frombuffer(file, dtype=torch.uint8)
        self._end = start

    @property
    def end(self) -> int:
        """Bytes of the file that are taken."""
        return self._end

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """See WeightMemory. Raises InternalError when the file ends before: it is another model's."""
        start = -(-self._end // _ALIGNMENT) * _ALIGNMENT
        end = start + torch.Size(shape).numel() * dtype.itemsize
        if end > len(self._bytes):
            raise InternalError(f"shared weights end at {len(self._bytes)} bytes, and {end} are needed")
        self._end = end
        return self._bytes[start:end].view(dtype).view(tuple(shape))

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """See WeightMemory."""
        if self._has(tensor):
            return tensor
        kept = self.empty(tensor.shape, tensor.dtype)
        if not self.is_filled:
            kept.copy_(tensor)
        return kept

    def _has(self, tensor: torch.Tensor) -> bool:
        if tensor.is_meta:
            return False
        first = self._bytes.data_ptr()
        return first <= tensor.data_ptr() < first + len(self._bytes)
