"""The kernel backend on the native CPU kernels of ``native/``, packed weights included."""

from itertools import chain
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from disagg.base.errors import InternalError
from disagg.cache.layout import KvFormat
from disagg.engine.kernels.blocks import BlockWeight
from disagg.engine.kernels.int8 import Int8Weight
from disagg.engine.kernels.interface import (
    DecoderSettings,
    DecoderStack,
    DecoderWeights,
    DrawSettings,
    Linear,
    LogitBounds,
    StepBatch,
)
from disagg.engine.kernels.native_decoder import NO_WINDOW, NativeDecoder, head_dim_of
from disagg.engine.kernels.native_linear import PackedLinear, address_of, array_address, check_tensor
from disagg.engine.kernels.native_mlp import native_activation, native_linear
from disagg.engine.kernels.prepared_steps import PreparedSteps
from disagg.engine.kernels.torch_backend import plain_int8_linear, plain_linear
from disagg.engine.kernels.weight_memory import PRIVATE, WeightMemory
from disagg.models.config import Activation

try:
    from disagg.engine.kernels import _native

    _import_error: ImportError | None = None
except ImportError as error:
    _import_error = error

DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
BLOCK_SIZES: Final = (16, 32, 64, 128)
_OPENMP_LIBRARIES: Final = ("libgomp", "libiomp5", "libomp")


def are_built() -> bool:
    """Return whether there are native kernels at all."""
    return _import_error is None


def native_unavailable_reason(
    device: torch.device, dtype: torch.dtype, head_dim: int | None = None, block_size: int | None = None
) -> str | None:
    """Return why the native kernels cannot serve a model and pool of these properties, or None when they can."""
    if device.type != "cpu":
        return f"they are for the CPU, not for {device}"
    if dtype not in DTYPES:
        return f"they have no {dtype}; use float32, bfloat16 or float16"
    if head_dim is not None and (head_dim % 16 or not 16 <= head_dim <= 256):
        return f"their head dimensions are multiples of 16 up to 256, not {head_dim}"
    if block_size is not None and block_size not in BLOCK_SIZES:
        return f"their KV block sizes are {', '.join(map(str, BLOCK_SIZES))}, not {block_size}"
    if _import_error is not None:
        return f"they were not built when disagg was installed ({_import_error}); install a C++ compiler and reinstall"
    return None


class NativeBackend:
    """Every operation of a decoder layer in C++, for float32, bfloat16 and float16 on the CPU.

    ``instruction_set`` is one of ``instruction_sets()``, by default the fastest this processor has. Work is spread
    over ``torch.get_num_threads()`` threads of PyTorch's own pool, that of a fused decoder over ``helpers`` as well. A
    StepBatch and its tensors must not change while it is in use: it is checked and planned once per step, and the
    indices in it are trusted from then on.

    Activations and weights must share one element type and be contiguous; a mistake raises InternalError, as does a
    block id outside the pool.
    """

    name = "native"
    kv_format = KvFormat.INTERLEAVED
    keeps_weights = False

    def __init__(self, instruction_set: str | None = None, helpers: "_native.Helpers | None" = None) -> None:
        self.instruction_set = instruction_set or instruction_sets()[0]
        self._helpers = helpers
        self._kernels = {
            torch.float32: _native.Kernels(self.instruction_set, _native.ElementType.FLOAT32),
            torch.bfloat16: _native.Kernels(self.instruction_set, _native.ElementType.BFLOAT16),
            torch.float16: _native.Kernels(self.instruction_set, _native.ElementType.FLOAT16),
        }
        self._steps = PreparedSteps[_native.Step]()
        share_openmp()

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None, memory: WeightMemory = PRIVATE) -> Linear:
        """Copy ``weight`` into the order in which the kernels read it."""
        if weight.dtype is not torch.float32 and weight.shape[1] % 2:
            return plain_linear(weight.clone(), bias, memory)
        return self._pack(weight, weight.dtype, [], bias, memory)

    def int8_linear(
        self, weight: Int8Weight, bias: torch.Tensor | None, dtype: torch.dtype, memory: WeightMemory = PRIVATE
    ) -> Linear:
        """Copy ``weight`` into the order in which the kernels read it."""
        if dtype is not torch.float32 and weight.values.shape[1] % 2:
            return plain_int8_linear(weight, bias, memory)
        return self._pack(weight.values, dtype, memory.keep(weight.scale).tolist(), bias, memory)

    def block_linear(
        self, weight: BlockWeight, bias: torch.Tensor | None, dtype: torch.dtype, memory: WeightMemory = PRIVATE
    ) -> Linear:
        """Copy ``weight`` into the order in which the kernels read it: about as many bytes as the file has."""
        return self._pack(weight, dtype, [], bias, memory)

    def fuse_decoder(self, weights: DecoderWeights, settings: DecoderSettings) -> DecoderStack | None:
        """Return the decoder as one native call; None where a weight could not be packed."""
        linears = chain((weights.head,), *(layer.linears for layer in weights.layers))
        if not all(isinstance(linear, PackedLinear) for linear in linears):
            return None
        vocab_size, hidden = weights.embeddings.shape
        num_positions, rotary_dim = settings.layers[0].cos_sin.shape
        q_norm = weights.layers[0].q_norm
        native = _native.Decoder(
            kernels=self._kernels[weights.norm.dtype],
            hidden=hidden,
            vocab_size=vocab_size,
            embeddings=weights.embeddings.data_ptr(),
            norm=weights.norm.data_ptr(),
            head=native_linear(weights.head),
            num_positions=num_positions,
            rotary_dim=rotary_dim,
            norm_rows=q_norm is not None and len(q_norm) > head_dim_of(weights.layers[0], settings),
            eps=settings.eps,
            scale=settings.scale,
            attention_softcap=settings.softcap or 0.0,
            residual_multiplier=settings.residual_multiplier,
            logit_scale=settings.logits.multiplier,
            logit_softcap=settings.logits.softcap or 0.0,
        )
        return NativeDecoder(native, weights, settings, self._prepare, self._helpers)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Return x / rms(x) * weight; the whole is computed in float32 and rounded once."""
        return self._rms_norm(x, None, weight, eps, None, 1.0)

    def add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float,
        *,
        x_norm: torch.Tensor | None = None,
        multiplier: float = 1.0,
    ) -> torch.Tensor:
        """Add x to ``residual`` in place, then return the normalised sum."""
        return self._rms_norm(x, residual, weight, eps, x_norm, multiplier)

    def rope_and_write_kv(
        self,
        qkv: torch.Tensor,
        cos_sin: torch.Tensor,
        kv_layer: torch.Tensor,
        batch: StepBatch,
        num_heads: int,
        num_kv_heads: int,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        eps: float,
    ) -> torch.Tensor:
        """Normalise and rotate Q and K, write K and V into the pool, return Q [T, Hq, D]."""
        num_positions, rotary_dim = cos_sin.shape
        rows, width = qkv.shape
        head_dim = width // (num_heads + 2 * num_kv_heads)
        step = self._prepare(batch, kv_layer, num_heads, head_dim)
        check_tensor(qkv, qkv.dtype, rows * (num_heads + 2 * num_kv_heads) * head_dim)
        check_tensor(cos_sin, torch.float32, num_positions * rotary_dim)
        norm_rows = q_norm is not None and len(q_norm) > head_dim
        for norm, heads in ((q_norm, num_heads), (k_norm, num_kv_heads)):
            if norm is not None:
                check_tensor(norm, qkv.dtype, (heads if norm_rows else 1) * head_dim)
        if kv_layer.dtype is not qkv.dtype or rows != len(batch.token_ids):
            raise InternalError(f"{rows} rows of {qkv.dtype} for a step of {len(batch.token_ids)} and {kv_layer.dtype}")
        q = qkv.new_empty((rows, num_heads, head_dim))
        try:
            self._kernels[qkv.dtype].rope_and_write_kv(
                step,
                qkv.data_ptr(),
                q.data_ptr(),
                kv_layer.data_ptr(),
                cos_sin.data_ptr(),
                num_positions,
                rotary_dim,
                address_of(q_norm),
                address_of(k_norm),
                norm_rows,
                eps,
                torch.get_num_threads(),
            )
        except IndexError as error:
            raise InternalError(f"step refused: {error}") from error
        return q

    def attention(
        self,
        q: torch.Tensor,
        kv_layer: torch.Tensor,
        batch: StepBatch,
        scale: float,
        sliding_window: int | None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Return causal attention of Q [T, Hq, D] over each sequence's blocks, as [T, Hq * D]."""
        rows, num_heads, head_dim = q.shape
        step = self._prepare(batch, kv_layer, num_heads, head_dim)
        check_tensor(q, kv_layer.dtype, len(batch.token_ids) * num_heads * head_dim)
        out = q.new_empty((rows, num_heads * head_dim))
        window = NO_WINDOW if sliding_window is None else sliding_window
        self._kernels[q.dtype].attention(
            step,
            q.data_ptr(),
            out.data_ptr(),
            kv_layer.data_ptr(),
            scale,
            softcap or 0.0,
            window,
            torch.get_num_threads(),
        )
        return out

    def gate(self, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
        """Return activation(left half) * right half; gate_up is [T, 2 * intermediate]."""
        rows, width = gate_up.shape
        check_tensor(gate_up, gate_up.dtype, rows * width)
        out = gate_up.new_empty((rows, width // 2))
        self._kernels[gate_up.dtype].gate(
            native_activation(activation), gate_up.data_ptr(), out.data_ptr(), rows, width // 2, torch.get_num_threads()
        )
        return out

    def bound_logits(self, logits: torch.Tensor, bounds: LogitBounds) -> None:
        """Multiply and bound logits in place."""
        rows, width = logits.shape
        check_tensor(logits, logits.dtype, rows * width)
        self._kernels[logits.dtype].scale_and_cap(
            logits.data_ptr(), rows, width, bounds.multiplier, bounds.softcap or 0.0, torch.get_num_threads()
        )

    def most_likely(self, logits: torch.Tensor) -> npt.NDArray[np.int64]:
        """See ``ChoosesTokens``."""
        rows, width = logits.shape
        check_tensor(logits, logits.dtype, rows * width)
        tokens = np.empty(rows, dtype=np.int64)
        self._kernels[logits.dtype].find_largest(
            logits.data_ptr(), tokens.ctypes.data, rows, width, torch.get_num_threads()
        )
        return tokens

    def draw(self, logits: torch.Tensor, settings: DrawSettings, head_floor: float) -> npt.NDArray[np.int64]:
        """See ``ChoosesTokens``."""
        rows, width = logits.shape
        check_tensor(logits, logits.dtype, rows * width)
        native = _native.DrawSettings(
            temperature=array_address(settings.temperature, np.float64, rows),
            top_p=array_address(settings.top_p, np.float64, rows),
            min_p=array_address(settings.min_p, np.float64, rows),
            top_k=array_address(settings.top_k, np.int32, rows),
            seed=array_address(settings.seed, np.uint64, rows),
            position=array_address(settings.position, np.uint64, rows),
            floor=head_floor,
        )
        tokens = np.empty(rows, dtype=np.int64)
        self._kernels[logits.dtype].draw(
            logits.data_ptr(), native, tokens.ctypes.data, rows, width, torch.get_num_threads()
        )
        return tokens

    def forbid(self, logits: torch.Tensor, rows: npt.NDArray[np.int64], allowed: npt.NDArray[np.uint32]) -> None:
        """See ``ChoosesTokens``."""
        num_rows, width = logits.shape
        check_tensor(logits, logits.dtype, num_rows * width)
        count = len(rows)
        if count and not 0 <= rows.min() <= rows.max() < num_rows:
            raise ValueError(f"rows {rows.tolist()} are not all of {num_rows}")
        numbers = array_address(rows, np.int64, count)
        bits = array_address(allowed.reshape(-1), np.uint32, count * -(-width // 32))
        self._kernels[logits.dtype].forbid(logits.data_ptr(), bits, numbers, count, width, torch.get_num_threads())

    def _pack(
        self,
        weight: torch.Tensor | BlockWeight,
        dtype: torch.dtype,
        scale: list[float],
        bias: torch.Tensor | None,
        memory: WeightMemory,
    ) -> PackedLinear:
        offsets = [] if bias is None else memory.keep(bias).float().tolist()
        blocks = None
        if isinstance(weight, BlockWeight):
            blocks = getattr(_native.BlockFormat, weight.format.name)
        out_features, in_features = (weight.values if isinstance(weight, BlockWeight) else weight).shape
        native = _native.Linear(self._kernels[dtype], out_features, in_features, scale, offsets, blocks)
        return PackedLinear(native, weight, dtype, memory)

    def _rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor | None,
        eps: float,
        x_norm: torch.Tensor | None,
        multiplier: float,
    ) -> torch.Tensor:
        rows, width = x.shape
        dtype = x.dtype
        for values in (x, residual):
            if values is not None:
                check_tensor(values, dtype, rows * width)
        for norm in (x_norm, weight):
            if norm is not None:
                check_tensor(norm, dtype, width)
        source = x if residual is None else residual
        out = source if weight is None else torch.empty_like(x)
        self._kernels[dtype].rms_norm(
            x.data_ptr(),
            address_of(residual),
            address_of(x_norm),
            address_of(weight),
            out.data_ptr(),
            rows,
            width,
            multiplier,
            eps,
            torch.get_num_threads(),
        )
        return out

    def _prepare(self, batch: StepBatch, kv_layer: torch.Tensor, num_heads: int, head_dim: int) -> "_native.Step":
        """Return the native form of ``batch``: made by the first layer, found again by the others."""
        shape = (kv_layer.shape, num_heads)
        return self._steps.get(batch, shape, lambda: _make_step(batch, kv_layer, num_heads, head_dim))


def instruction_sets() -> list[str]:
    """Return the instruction sets that the kernels were built for and this processor has, the fastest first."""
    return _native.instruction_sets()


def share_openmp() -> bool:
    """Let the kernels use the OpenMP threads that PyTorch uses: two pools would spin against each other.

    Returns False, and all kernels stay on the calling thread, where PyTorch was built without a known OpenMP runtime.
    """
    with Path("/proc/self/maps").open() as maps:
        paths = {line.split()[-1] for line in maps if "/" in line}
    return any(_native.use_openmp(path) for path in sorted(paths) if Path(path).name.startswith(_OPENMP_LIBRARIES))


def _make_step(batch: StepBatch, kv_layer: torch.Tensor, num_heads: int, head_dim: int) -> "_native.Step":
    num_blocks, _, num_kv_heads, head_elements = kv_layer.shape
    num_sequences, table_width = batch.block_tables.shape
    if not kv_layer.is_contiguous():
        raise InternalError(f"the KV pool must be contiguous, its strides are {kv_layer.stride()}")
    check_tensor(batch.query_start, torch.int32, num_sequences + 1)
    check_tensor(batch.context_lens, torch.int32, num_sequences)
    check_tensor(batch.block_tables, torch.int32, num_sequences * table_width)
    try:
        return _native.Step(
            num_blocks=num_blocks,
            num_kv_heads=num_kv_heads,
            group=num_heads // num_kv_heads,
            head_dim=head_dim,
            block_size=head_elements // head_dim,
            query_start=batch.query_start.data_ptr(),
            context_lens=batch.context_lens.data_ptr(),
            block_tables=batch.block_tables.data_ptr(),
            num_rows=batch.token_ids.shape[0],
            num_sequences=num_sequences,
            table_width=table_width,
        )
    except (IndexError, ValueError) as error:
        raise InternalError(f"step refused: {error}") from error
