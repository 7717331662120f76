"""Where weights come from: safetensors or GGUF, one tensor at a time, under Hugging Face's names."""

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from disagg.base.errors import ConfigurationError, InternalError
from disagg.engine.kernels.blocks import BlockFormat, BlockWeight
from disagg.engine.model.expert_tensors import gguf_expert_tensors
from disagg.engine.model.gguf_blocks import BLOCK_FORMATS, read_blocks
from disagg.models.config import Architecture, ModelConfig
from disagg.models.gguf_file import GgufFile, GgufTensor, hf_tensor_name, is_rope_table, undo_rope_permutation
from disagg.models.locate import ModelFiles, ModelKind
from disagg.models.text_part import text_tensor_name

_PERMUTED: Final = (Architecture.LLAMA, Architecture.MIXTRAL, Architecture.GRANITE)
"""llama.cpp's converter changes the order of their query and key rows."""

_LIBC: Final = ctypes.CDLL(None)
_ELEMENT_TYPES: Final = ("F64", "F32", "F16", "BF16")


class TensorSource(Protocol):
    """Named tensors that can be looked at before they are read."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor, by name, reading none."""

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor on the CPU, in the file's element type or float32. It may share memory with the file."""

    def copy(self, name: str, place: torch.Tensor) -> None:
        """Copy one tensor to ``place``, cast to its element type; the file's pages leave the process's memory."""

    def block_format(self, name: str) -> BlockFormat | None:
        """Return the blocks in which a matrix is stored, None where they cannot be kept."""

    def read_blocks(self, name: str) -> BlockWeight:
        """Return a matrix of which ``block_format`` is not None, in memory of its own."""


@contextmanager
def open_tensors(files: ModelFiles, config: ModelConfig) -> Iterator[TensorSource]:
    """Open the model's weight files. Raises ConfigurationError when one is missing or damaged."""
    if files.kind is ModelKind.GGUF:
        with GgufFile(files.path) as file:
            yield _GgufSource(file, config)
        return
    with ExitStack() as stack:
        yield _SafetensorsSource(files, stack, adds_one_to_norms=config.norms_stored_less_one)


class _SafetensorsSource:
    """One file, or the shards of an index. Tensors are mapped, so that only what is read becomes resident.

    The index decides which of several shards a tensor comes from.
    """

    def __init__(self, files: ModelFiles, stack: ExitStack, *, adds_one_to_norms: bool = False) -> None:
        self._files: dict[str, safe_open] = {}
        self._stored_names: dict[str, str] = {}
        self._adds_one_to_norms = adds_one_to_norms
        weight_map = files.weight_map()
        for path in files.weight_files():
            try:
                file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            except (SafetensorError, OSError) as error:
                raise ConfigurationError(f"cannot read {path}: {error}; download it again") from error
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                if weight_map.get(name, path) != path:
                    continue
                if name in self._files:
                    raise ConfigurationError(f"tensor {name!r} is in two files, the second is {path}")
                _check_element_type(file, name, path)
                self._files[name] = file
        for name, path in weight_map.items():
            if name not in self._files:
                raise ConfigurationError(
                    f"the index puts tensor {name!r} into {path}, which lacks it; download it again"
                )
        for stored in self._files:
            name = text_tensor_name(stored)
            if name is not None:
                self._stored_names[name] = stored

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            name: tuple(self._files[stored].get_slice(stored).get_shape())  # type: ignore[no-untyped-call]
            for name, stored in self._stored_names.items()
        }

    def read(self, name: str) -> torch.Tensor:
        return self._adjusted(name, self._mapped(name))

    def copy(self, name: str, place: torch.Tensor) -> None:
        mapped = self._mapped(name)
        place.copy_(self._adjusted(name, mapped))
        _drop_pages(mapped)

    def block_format(self, name: str) -> BlockFormat | None:
        return None

    def read_blocks(self, name: str) -> BlockWeight:
        raise InternalError(f"tensor {name!r} is in no blocks")

    def _mapped(self, name: str) -> torch.Tensor:
        stored = self._stored_names[name]
        tensor: torch.Tensor = self._files[stored].get_tensor(stored)  # type: ignore[no-untyped-call]
        return tensor

    def _adjusted(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.float() + 1.0 if self._adds_one_to_norms and name.endswith("norm.weight") else tensor


def _drop_pages(mapped: torch.Tensor) -> None:
    """Let go of the whole pages of a tensor that a file is mapped to: without it the file would be resident twice.

    They stay in the page cache, and come back when they are looked at again.
    """
    start = -(-mapped.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (mapped.data_ptr() + mapped.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        _LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def _check_element_type(file: safe_open, name: str, path: Path) -> None:
    stored: str = file.get_slice(name).get_dtype()  # type: ignore[no-untyped-call]
    if stored not in _ELEMENT_TYPES:
        raise ConfigurationError(
            f"{path}: tensor {name!r} is stored as {stored}; supported: {', '.join(_ELEMENT_TYPES)} (unquantised), or "
            "any GGUF file"
        )


class _GgufSource:
    """A GGUF file, dequantised tensor by tensor; Llama's query and key rows are put back in order."""

    def __init__(self, file: GgufFile, config: ModelConfig) -> None:
        self._file = file
        self._tensors: dict[str, GgufTensor] = {}
        for name, tensor in file.tensors.items():
            if not is_rope_table(name):
                # A tensor without a counterpart keeps its name, so that it is refused as left over.
                alone = {hf_tensor_name(name, config) or name: tensor}
                self._tensors |= gguf_expert_tensors(tensor, config) or alone
        permuted = config.architecture in _PERMUTED
        self._permuted_heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads} if permuted else {}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        values = self._file.read_tensor(self._tensors[name])
        num_heads = self._permuted_heads.get(name.split(".")[-2])
        if num_heads is not None:
            values = undo_rope_permutation(values, num_heads)
        return torch.from_numpy(values)

    def copy(self, name: str, place: torch.Tensor) -> None:
        place.copy_(self.read(name))

    def block_format(self, name: str) -> BlockFormat | None:
        return BLOCK_FORMATS.get(self._tensors[name].quantization)

    def read_blocks(self, name: str) -> BlockWeight:
        tensor = self._tensors[name]
        num_rows = tensor.shape[0]
        weight = read_blocks(self._file.stored(tensor), tensor.quantization, num_rows)
        num_heads = self._permuted_heads.get(name.split(".")[-2])
        if num_heads is None:
            return weight
        return weight.rows(torch.from_numpy(undo_rope_permutation(np.arange(num_rows), num_heads)))
