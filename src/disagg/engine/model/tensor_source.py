"""Where weights come from: safetensors or GGUF, one tensor at a time, under Hugging Face's names."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from disagg.base.errors import ConfigurationError
from disagg.models.config import Architecture, ModelConfig
from disagg.models.gguf_file import GgufFile, hf_tensor_name, undo_rope_permutation
from disagg.models.locate import ModelFiles, ModelKind


class TensorSource(Protocol):
    """Named tensors that can be looked at before they are read."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor, by name, reading none."""

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor on the CPU, in the file's element type or float32. It may share memory with the file."""


@contextmanager
def open_tensors(files: ModelFiles, config: ModelConfig) -> Iterator[TensorSource]:
    """Open the model's weight files. Raises ConfigurationError when one is missing or damaged."""
    if files.kind is ModelKind.GGUF:
        with GgufFile(files.path) as file:
            yield _GgufSource(file, config)
        return
    with ExitStack() as stack:
        yield _SafetensorsSource(files.weight_files(), stack)


class _SafetensorsSource:
    """One file, or the shards of an index. Tensors are mapped, so that only what is read becomes resident."""

    def __init__(self, paths: tuple[Path, ...], stack: ExitStack) -> None:
        self._files: dict[str, safe_open] = {}
        for path in paths:
            try:
                file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            except (SafetensorError, OSError) as error:
                raise ConfigurationError(f"cannot read {path}: {error}; download it again") from error
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                if name in self._files:
                    raise ConfigurationError(f"tensor {name!r} is in two files, the second is {path}")
                self._files[name] = file

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self._files.items()}  # type: ignore[no-untyped-call]

    def read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._files[name].get_tensor(name)  # type: ignore[no-untyped-call]
        return tensor


class _GgufSource:
    """A GGUF file, dequantised tensor by tensor; Llama's query and key rows are put back in order."""

    def __init__(self, file: GgufFile, config: ModelConfig) -> None:
        self._file = file
        self._names = {hf_name: name for name in file.tensors if (hf_name := hf_tensor_name(name)) is not None}
        permuted = config.architecture is Architecture.LLAMA
        self._permuted_heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads} if permuted else {}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {hf_name: self._file.tensors[name].shape for hf_name, name in self._names.items()}

    def read(self, name: str) -> torch.Tensor:
        values = self._file.read(self._names[name])
        num_heads = self._permuted_heads.get(name.split(".")[-2])
        if num_heads is not None:
            values = undo_rope_permutation(values, num_heads)
        return torch.from_numpy(values)
