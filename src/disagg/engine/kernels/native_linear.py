"""Weight matrices in the order in which the native kernels read them."""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from disagg.base.errors import InternalError
from disagg.engine.kernels.blocks import BlockWeight
from disagg.engine.kernels.weight_memory import PRIVATE, WeightMemory

if TYPE_CHECKING:
    from disagg.engine.kernels import _native


class PackedLinear:
    """A weight matrix in panels of as many output features as a few vectors have lanes."""

    __slots__ = ("_dtype", "_packed", "in_features", "native", "out_features")

    def __init__(
        self,
        native: "_native.Linear",
        weight: torch.Tensor | BlockWeight,
        dtype: torch.dtype,
        memory: WeightMemory = PRIVATE,
    ) -> None:
        """Pack ``weight`` [out_features, in_features] for activations of ``dtype``; in ``memory`` it may be already."""
        self.native = native
        self.out_features, self.in_features = (weight.values if isinstance(weight, BlockWeight) else weight).shape
        self._dtype = dtype
        self._packed = memory.empty((native.packed_bytes(),), torch.int8)
        if memory.is_filled:
            native.use_packed(self._packed.data_ptr())
        elif isinstance(weight, BlockWeight):
            _pack_blocks(native, weight, self._packed)
        else:
            native.pack(weight.contiguous().data_ptr(), self._packed.data_ptr(), torch.get_num_threads())

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See ``Linear``."""
        rows = len(x)
        check_tensor(x, self._dtype, rows * self.in_features)
        out = x.new_empty((rows, self.out_features))
        self.native.multiply(x.data_ptr(), out.data_ptr(), rows, torch.get_num_threads())
        return out


def _pack_blocks(native: "_native.Linear", weight: BlockWeight, packed: torch.Tensor) -> None:
    parts = {"offset": weight.offset, "sub_scale": weight.sub_scale, "sub_offset": weight.sub_offset}
    check_tensor(weight.values, torch.int8, weight.values.numel())
    check_tensor(weight.scale, torch.float16, weight.values.numel() // weight.format.scale_size)
    native.pack_blocks(
        values=weight.values.data_ptr(),
        scale=weight.scale.data_ptr(),
        **{name: 0 if part is None else part.data_ptr() for name, part in parts.items()},
        packed=packed.data_ptr(),
        num_threads=torch.get_num_threads(),
    )


def address_of(tensor: torch.Tensor | None) -> int:
    """Return where a tensor's elements are, 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def check_tensor(tensor: torch.Tensor, dtype: torch.dtype, num_elements: int) -> None:
    """Refuse what the kernels would read wrongly: they see an address and nothing else."""
    if tensor.dtype is not dtype or tensor.numel() != num_elements or not tensor.is_contiguous():
        raise InternalError(
            f"a kernel got {tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}, "
            f"it needs {num_elements} contiguous elements of {dtype}"
        )


def array_address(values: npt.NDArray[Any], dtype: npt.DTypeLike, size: int) -> int:
    """Return where an array is; refuse one that the kernels would read wrongly."""
    if values.dtype != dtype or values.shape != (size,) or not values.flags.c_contiguous:
        raise InternalError(f"a kernel got {values.dtype} {list(values.shape)}, it needs {size} of {np.dtype(dtype)}")
    return values.ctypes.data
