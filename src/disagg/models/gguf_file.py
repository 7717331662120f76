"""Reading a GGUF file through a memory map: metadata, and tensors as float32 under Hugging Face's names.

The header is parsed here, because ``gguf.GGUFReader`` makes a numpy array of every string of the vocabulary: 2.1 s for
a 49k-token model, against 0.03 s for this. Block formats and dequantisation are the ``gguf`` package's.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import contextlib
import mmap
import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from disagg.base.errors import ConfigurationError, UnsupportedModelError
from disagg.models.config import ModelConfig
from disagg.models.shape import NormPlacement

Scalar = int | float | bool | str
MetadataValue = Scalar | list[str] | npt.NDArray[np.generic]

Element = TypeVar("Element", bound=np.generic)

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_STRING: Final = 8
_ARRAY: Final = 9
_SCALAR_DTYPES: Final[dict[int, str]] = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_PLAIN: Final = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)
_MAX_DIMENSIONS: Final = 4

_HF_NAMES: Final = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_FUSED_NAMES: Final = {"ffn_up": "mlp.gate_up_proj"}
_AROUND_NAMES: Final = {"ffn_norm": "pre_feedforward_layernorm"}
"""Where a layer has norms on both sides of its parts."""
_TENSOR_NAME: Final = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<part>\w+)\.(?P<kind>weight|bias)")

_DEQUANTISE_BYTES: Final = 1 << 12
"""``gguf`` dequantises 16 rows at a time. Rows of about this many bytes keep it in cache and out of the Python
interpreter: 0.4 s for SmolLM2-135M's Q4_1 weights on one core, where rows as stored take 1.1 s. So fast that no
converted copy of the weights is kept."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where one tensor is. ``shape`` is outermost first, as in torch (GGUF stores it innermost first)."""

    name: str
    shape: tuple[int, ...]
    quantization: GGMLQuantizationType
    offset: int
    num_bytes: int

    def split(self) -> tuple["GgufTensor", ...]:
        """Return the matrices of which a tensor of three dimensions consists."""
        size = self.num_bytes // max(1, self.shape[0])
        return tuple(
            replace(self, shape=self.shape[1:], offset=self.offset + place * size, num_bytes=size)
            for place in range(self.shape[0])
        )


class GgufFile:
    """A memory-mapped GGUF file. Close it, or use it as a context manager.

    Raises ConfigurationError when the file is not GGUF, of a version or byte order not known here, or cut short.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            if file.read(4) != _MAGIC:
                raise ConfigurationError(f"{path} is not a GGUF file: it does not begin with {_MAGIC.decode()!r}")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            reader = _HeaderReader(self._map)
            self.metadata = reader.metadata
            self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        except (struct.error, UnicodeDecodeError, ValueError, OverflowError, MemoryError) as error:
            self._map.close()
            raise ConfigurationError(f"{path} is damaged or cut short: its header ends early ({error})") from error
        except ConfigurationError as error:
            self._map.close()
            raise type(error)(f"{path}: {error}") from error

    def close(self) -> None:
        """Unmap the file, or leave that to the last array that still looks into it (one held by a traceback)."""
        with contextlib.suppress(BufferError):
            self._map.close()

    def __enter__(self) -> "GgufFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check_formats(self) -> None:
        """Raise UnsupportedModelError naming the first tensor that is stored in blocks that cannot be dequantised."""
        first = {tensor.quantization: tensor for tensor in reversed(self.tensors.values())}
        for quantization, tensor in first.items():
            if quantization not in _PLAIN:
                _, num_bytes = GGML_QUANT_SIZES[quantization]
                self._dequantized(np.zeros((1, num_bytes), np.uint8), tensor)

    def stored(self, tensor: GgufTensor) -> npt.NDArray[np.uint8]:
        """Return the bytes of one tensor, in the file's own memory."""
        return np.frombuffer(self._map, np.uint8, tensor.num_bytes, tensor.offset)

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """Return one tensor, dequantised to float32, in torch's shape; the array owns its memory.

        Raises KeyError for a name that is not in the file, and what ``read_tensor`` raises.
        """
        return self.read_tensor(self.tensors[name])

    def read_tensor(self, tensor: GgufTensor) -> npt.NDArray[np.float32]:
        """Return a tensor of the file, or a part of one, as ``read`` does.

        Raises UnsupportedModelError for a block format that ``gguf`` cannot dequantise.
        """
        try:
            return self._read(tensor)
        finally:
            # What was read stays in the page cache, and leaves this process's memory.
            start = tensor.offset // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, start, tensor.offset + tensor.num_bytes - start)

    def _read(self, tensor: GgufTensor) -> npt.NDArray[np.float32]:
        stored = self.stored(tensor)
        if tensor.quantization is GGMLQuantizationType.F32:
            return stored.view(np.float32).reshape(tensor.shape).copy()
        num_rows = 1 if len(tensor.shape) < 2 else int(np.prod(tensor.shape[:-1]))
        rows = stored.reshape(_num_merged_rows(num_rows, tensor.num_bytes), -1)
        return self._dequantized(rows, tensor).reshape(tensor.shape)

    def _dequantized(self, rows: npt.NDArray[np.uint8], tensor: GgufTensor) -> npt.NDArray[np.float32]:
        try:
            values: npt.NDArray[np.float32] = dequantize(rows, tensor.quantization)
        except NotImplementedError as error:
            raise UnsupportedModelError(
                f"{self.path}: tensor {tensor.name!r} is stored as {tensor.quantization.name}, which cannot be "
                "dequantised; take a file in another quantisation, such as Q8_0 or Q4_K_M"
            ) from error
        return values


def hf_tensor_name(name: str, config: ModelConfig) -> str | None:
    """Return the Hugging Face name of a GGUF tensor, or None for one that the decoder has no use for."""
    names = _HF_NAMES
    if config.fused_projections:
        names = names | _FUSED_NAMES
    if config.norm_placement is NormPlacement.AROUND:
        names = names | _AROUND_NAMES
    match = _TENSOR_NAME.fullmatch(name)
    if match is None or match["part"] not in names:
        return None
    part = names[match["part"]]
    prefix = "" if match["layer"] is None else f"model.layers.{match['layer']}."
    return f"{prefix}{part}.{match['kind']}"


def is_rope_table(name: str) -> bool:
    """Return whether a tensor holds or scales the rotary embedding's frequencies, and is no weight."""
    return name in ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight") or name.endswith(
        ".attn_rot_embd.weight"
    )


def undo_rope_permutation(weight: npt.NDArray[Element], num_heads: int) -> npt.NDArray[Element]:
    """Return a query or key projection (or its bias) in Hugging Face's order of rows.

    llama.cpp's converter interleaves the two halves of each head of Llama models for its own rotary kernel.
    """
    half = weight.shape[0] // num_heads // 2
    return weight.reshape(num_heads, half, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _num_merged_rows(num_rows: int, num_bytes: int) -> int:
    """Return into how many equal rows the data is best cut: about ``_DEQUANTISE_BYTES`` each, no row split."""
    rows = max(1, min(num_rows, num_bytes // _DEQUANTISE_BYTES))
    while num_rows % rows:
        rows -= 1
    return rows


class _HeaderReader:
    """Parses everything before the tensor data."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 4
        version = self._uint32()
        if version not in _VERSIONS:
            swapped = " (the file is big-endian)" if version & 0xFFFF == 0 else ""
            raise ConfigurationError(f"GGUF version {version} is not supported{swapped}; supported: 2 and 3")
        num_tensors, num_entries = self._uint64(), self._uint64()
        self.metadata: dict[str, MetadataValue] = {}
        for _ in range(num_entries):
            key = self._string()
            self.metadata[key] = self._value(self._uint32())
        descriptions = [self._tensor_description() for _ in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ConfigurationError(f"general.alignment should be a positive integer, got {alignment!r}")
        start = -(-self._at // alignment) * alignment
        self.tensors = [self._tensor(*description, start) for description in descriptions]

    def _uint32(self) -> int:
        value: int = struct.unpack_from("<I", self._data, self._at)[0]
        self._at += 4
        return value

    def _uint64(self) -> int:
        value: int = struct.unpack_from("<Q", self._data, self._at)[0]
        self._at += 8
        return value

    def _string(self) -> str:
        length = self._uint64()
        end = self._at + length
        if end > len(self._data):
            raise ValueError(f"a string of {length} bytes at byte {self._at}")
        text = self._data[self._at : end].decode("utf-8")
        self._at = end
        return text

    def _value(self, kind: int) -> MetadataValue:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            element, length = self._uint32(), self._uint64()
            return self._strings(length) if element == _STRING else self._numbers(element, length)
        number: Scalar = self._numbers(kind, 1)[0].item()
        return number

    def _numbers(self, kind: int, length: int) -> npt.NDArray[np.generic]:
        if kind not in _SCALAR_DTYPES:
            raise ConfigurationError(f"metadata of GGUF type {kind} is not supported")
        dtype = np.dtype(_SCALAR_DTYPES[kind])
        values = np.frombuffer(self._data, dtype, length, self._at).copy()
        self._at += length * dtype.itemsize
        return values

    def _strings(self, length: int) -> list[str]:
        """Parse a vocabulary: the hot loop of opening a file, hence without a call per string."""
        data, at, size = self._data, self._at, len(self._data)
        unpack = struct.Struct("<Q").unpack_from
        strings = []
        for _ in range(length):
            (num_bytes,) = unpack(data, at)
            start = at + 8
            at = start + num_bytes
            if at > size:
                raise ValueError(f"a string of {num_bytes} bytes at byte {start}")
            strings.append(data[start:at].decode("utf-8"))
        self._at = at
        return strings

    def _tensor_description(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        num_dimensions = self._uint32()
        if num_dimensions > _MAX_DIMENSIONS:
            raise ConfigurationError(f"tensor {name!r} has {num_dimensions} dimensions; at most 4 are possible")
        dimensions = tuple(self._uint64() for _ in range(num_dimensions))
        return name, dimensions[::-1], self._uint32(), self._uint64()

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, offset: int, start: int) -> GgufTensor:
        try:
            quantization = GGMLQuantizationType(kind)
        except ValueError:
            raise UnsupportedModelError(f"tensor {name!r} is of a block format ({kind}) that is not known") from None
        block_size, block_bytes = GGML_QUANT_SIZES[quantization]
        num_elements = 1
        for size in shape:
            num_elements *= size
        num_bytes = num_elements // block_size * block_bytes
        if start + offset + num_bytes > len(self._data):
            raise ConfigurationError(f"the file is cut short: tensor {name!r} ends beyond it; download it again")
        return GgufTensor(name, shape, quantization, start + offset, num_bytes)
