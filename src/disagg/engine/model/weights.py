"""Loading: tensors are read one by one, cast, merged, packed for the backend, and let go.

Memory peaks at the packed weights plus the tensors of one merged matrix; the file's own pages are let go of.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Final

import msgspec
import torch

from disagg.base.config import DType, Quantization
from disagg.base.errors import ConfigurationError
from disagg.engine.kernels.blocks import BlockWeight
from disagg.engine.kernels.int8 import quantize_int8
from disagg.engine.kernels.interface import (
    DecoderWeights,
    DenseMlp,
    KernelBackend,
    LayerWeights,
    Linear,
    SparseMlp,
)
from disagg.engine.kernels.weight_memory import PRIVATE, CountedMemory, WeightMemory
from disagg.engine.model.expert_tensors import ExpertNames, expert_names, expert_shapes
from disagg.engine.model.tensor_source import TensorSource, open_tensors
from disagg.models.config import ModelConfig
from disagg.models.locate import ModelFiles, ModelKind
from disagg.models.shape import Experts, NormPlacement

TORCH_DTYPES: Final = {
    DType.FLOAT32: torch.float32,
    DType.BFLOAT16: torch.bfloat16,
    DType.FLOAT16: torch.float16,
}

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _NormNames:
    """What the norms of a layer are called: of what attention and MLP read and give, None where there is none."""

    attention: str | None
    attention_output: str | None
    mlp: str | None
    mlp_output: str | None


_NORMS: Final = {
    NormPlacement.BEFORE: _NormNames("input_layernorm", None, "post_attention_layernorm", None),
    NormPlacement.AFTER: _NormNames(None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    NormPlacement.AROUND: _NormNames(
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
    ),
}
_EMBEDDINGS: Final = "model.embed_tokens.weight"
_HEAD: Final = "lm_head.weight"

Progress = Callable[[float], None]
"""Called with the fraction of the weights that is loaded, 0 to 1, rising."""


def load_weights(
    files: ModelFiles,
    config: ModelConfig,
    backend: KernelBackend,
    *,
    dtype: DType,
    quantization: Quantization | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    memory: WeightMemory = PRIVATE,
) -> DecoderWeights:
    """Read the model's tensors and pack them for ``backend`` into ``memory``; where they lie there already, only look.

    A head of its own that differs from the embeddings is used even where the configuration ties them, as in
    transformers 5.

    Raises ConfigurationError naming the first tensor that is missing, left over or of the wrong shape; all of them are
    looked at before any is read.
    """
    if quantization is Quantization.GGUF and files.kind is not ModelKind.GGUF:
        raise ConfigurationError(
            f"--quantization gguf keeps the blocks of a GGUF file, and {files.path} is none; leave it out, or name "
            "such a file"
        )
    with open_tensors(files, config) as source:
        config = _with_own_head(config, source)
        expected = expected_shapes(config)
        check_shapes(expected, source.shapes(), config)
        loader = _Loader(
            source, backend, TORCH_DTYPES[dtype], torch.device(device), expected, progress, quantization, memory
        )
        return loader.load(config)


def most_weight_bytes(config: ModelConfig) -> int:
    """Return what the packed weights of a model take at most, in any element type: one copy, and a tied head."""
    return 4 * (config.num_parameters + config.vocab_size * config.hidden_size) * 2


def _with_own_head(config: ModelConfig, source: TensorSource) -> ModelConfig:
    """Return ``config`` as it is, or with its head untied where the file's is another matrix than the embeddings."""
    shapes = source.shapes()
    if not config.tie_word_embeddings or _HEAD not in shapes or _EMBEDDINGS not in shapes:
        return config
    if shapes[_HEAD] == shapes[_EMBEDDINGS] and torch.equal(source.read(_HEAD), source.read(_EMBEDDINGS)):
        return config
    _logger.warning("tie_word_embeddings is true, but the weights hold another %s: it is used", _HEAD)
    return msgspec.structs.replace(config, tie_word_embeddings=False)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that the model must have, by Hugging Face name, in order of use."""
    hidden, inner = config.hidden_size, config.intermediate_size
    linears = {
        "self_attn.o_proj": (hidden, config.q_size, config.attention_output_bias),
    }
    dense_mlp = {
        "mlp.down_proj": (hidden, inner, config.mlp_bias),
    }
    qkv, gate_up = _merged_names(config)
    qkv_sizes = (config.q_size, config.kv_size, config.kv_size)
    for name, size in zip(qkv, qkv_sizes if len(qkv) == len(qkv_sizes) else (sum(qkv_sizes),), strict=True):
        linears[name] = (size, hidden, config.qkv_bias)
    for name in gate_up:
        dense_mlp[name] = (2 * inner // len(gate_up), hidden, config.mlp_bias)
    shapes: dict[str, tuple[int, ...]] = {_EMBEDDINGS: (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        for norm in filter(None, astuple(_NORMS[config.norm_placement])):
            shapes[f"{prefix}{norm}.weight"] = (hidden,)
        experts = config.layer_experts[layer] if config.layer_experts else None
        for name, (num_rows, num_columns, has_bias) in (linears if experts else linears | dense_mlp).items():
            shapes[f"{prefix}{name}.weight"] = (num_rows, num_columns)
            if has_bias:
                shapes[f"{prefix}{name}.bias"] = (num_rows,)
        for name, size in zip(("q_norm", "k_norm"), config.qk_norm_sizes, strict=True):
            if size:
                shapes[f"{prefix}self_attn.{name}.weight"] = (size,)
        if experts is not None:
            shapes |= {f"{prefix}{name}": shape for name, shape in expert_shapes(config, experts).items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[_HEAD] = (config.vocab_size, hidden)
    return shapes


def _merged_names(config: ModelConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the projections that are merged into one product, and are one tensor in some files already."""
    if config.fused_projections:
        return ("self_attn.qkv_proj",), ("mlp.gate_up_proj",)
    return ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")


def check_shapes(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], config: ModelConfig) -> None:
    """Raise ConfigurationError where the files do not hold exactly the tensors that the configuration asks for."""
    architecture = config.architecture.value
    for name, shape in expected.items():
        if name not in found:
            raise ConfigurationError(
                f"the weights lack tensor {name!r} {list(shape)}, which {architecture} with this configuration needs"
            )
        if found[name] != shape:
            raise ConfigurationError(
                f"tensor {name!r} is {list(found[name])} in the weights, the configuration asks for {list(shape)}"
            )
    surplus = sorted(name for name in found if name not in expected and not _redundant(name, config))
    if surplus:
        raise ConfigurationError(
            f"the weights hold tensor {surplus[0]!r}, which {architecture} with this configuration does not use"
            + (f" (and {len(surplus) - 1} more)" if len(surplus) > 1 else "")
        )


def _redundant(name: str, config: ModelConfig) -> bool:
    """Tensors that repeat what is known: rotary tables of old checkpoints, and a head tied to the embeddings."""
    return name.endswith("rotary_emb.inv_freq") or (config.tie_word_embeddings and name == _HEAD)


class _Loader:
    """Reads tensors in order of use and reports how much of the whole is read."""

    def __init__(
        self,
        source: TensorSource,
        backend: KernelBackend,
        dtype: torch.dtype,
        device: torch.device,
        shapes: dict[str, tuple[int, ...]],
        progress: Progress | None,
        quantization: Quantization | None,
        memory: WeightMemory,
    ) -> None:
        self._source = source
        self._memory = CountedMemory(memory)
        self._backend = backend
        self._dtype = dtype
        self._device = device
        self._shapes = shapes
        self._progress = progress
        self._quantization = quantization
        self._total = sum(math.prod(shape) for shape in shapes.values())
        self._num_read = 0
        self._scratch = self._empty((0,))

    def load(self, config: ModelConfig) -> DecoderWeights:
        stored = self._stacked([_EMBEDDINGS])
        embeddings = self._memory.keep(self._scaled(stored, config.embedding_multiplier))
        unscaled = embeddings if config.embedding_multiplier == 1.0 else stored
        # Before the layers: the head is the largest matrix, and beside what is packed already it would be the peak.
        tied = config.tie_word_embeddings
        head = self._pack(self._blocks([_EMBEDDINGS]) or unscaled, None) if tied else self._linear("lm_head")
        del stored, unscaled
        layers = tuple(self._layer(layer, config) for layer in range(config.num_layers))
        norm = self._tensor("model.norm.weight")
        return DecoderWeights(embeddings, layers, norm, head, self._memory.num_bytes)

    def _scaled(self, embeddings: torch.Tensor, multiplier: float) -> torch.Tensor:
        """Return what a token's row is multiplied with, rounded as transformers rounds both."""
        return embeddings if multiplier == 1.0 else embeddings * torch.tensor(multiplier, dtype=self._dtype)

    def _layer(self, layer: int, config: ModelConfig) -> LayerWeights:
        prefix = f"model.layers.{layer}."
        norms = _NORMS[config.norm_placement]
        qkv, _ = _merged_names(config)
        experts = config.layer_experts[layer] if config.layer_experts else None
        return LayerWeights(
            attention_norm=self._norm(prefix, norms.attention),
            qkv=self._linear(*(prefix + name for name in qkv)),
            q_norm=self._norm(prefix, "self_attn.q_norm"),
            k_norm=self._norm(prefix, "self_attn.k_norm"),
            attention_output=self._linear(f"{prefix}self_attn.o_proj"),
            attention_output_norm=self._norm(prefix, norms.attention_output),
            mlp_norm=self._norm(prefix, norms.mlp),
            mlp=self._dense(prefix, config) if experts is None else self._sparse(prefix, config, experts),
            mlp_output_norm=self._norm(prefix, norms.mlp_output),
        )

    def _dense(self, prefix: str, config: ModelConfig) -> DenseMlp:
        _, gate_up = _merged_names(config)
        return DenseMlp(
            gate_up=self._linear(*(prefix + name for name in gate_up)),
            down=self._linear(f"{prefix}mlp.down_proj"),
            activation=config.activation,
        )

    def _expert(self, block: str, names: ExpertNames) -> DenseMlp:
        return DenseMlp(
            gate_up=self._linear(f"{block}.{names.gate}", f"{block}.{names.up}"),
            down=self._linear(f"{block}.{names.down}"),
        )

    def _sparse(self, prefix: str, config: ModelConfig, experts: Experts) -> SparseMlp:
        names = expert_names(config)
        shared = experts.shared_intermediate_size > 0
        routers = [names.router, names.shared_gate] if shared else [names.router]
        return SparseMlp(
            # A router decides: it keeps the element type.
            router=self._backend.linear(
                self._stacked([f"{prefix}{name}.weight" for name in routers]), None, self._memory
            ),
            experts=tuple(
                self._expert(f"{prefix}{names.expert(number)}", names) for number in range(experts.num_experts)
            ),
            num_per_token=experts.num_per_token,
            normalize_weights=experts.normalize_weights,
            shared=self._expert(f"{prefix}{names.shared}", names) if shared else None,
        )

    def _norm(self, prefix: str, name: str | None) -> torch.Tensor | None:
        """Return the weights of a norm, None where the model has none."""
        if name is None or f"{prefix}{name}.weight" not in self._shapes:
            return None
        return self._tensor(f"{prefix}{name}.weight")

    def _linear(self, *names: str) -> Linear:
        """Pack one projection, or several of the same input stacked into one."""
        matrices = [f"{name}.weight" for name in names]
        copied = self._quantization is Quantization.INT8 or not self._backend.keeps_weights
        weight = self._blocks(matrices) or self._stacked(matrices, in_scratch=copied)
        biased = f"{names[0]}.bias" in self._shapes
        bias = self._stacked([f"{name}.bias" for name in names]) if biased else None
        return self._pack(weight, bias)

    def _pack(self, weight: torch.Tensor | BlockWeight, bias: torch.Tensor | None) -> Linear:
        if isinstance(weight, BlockWeight):
            return self._backend.block_linear(weight, bias, self._dtype, self._memory)
        if self._quantization is Quantization.INT8:
            return self._backend.int8_linear(quantize_int8(weight), bias, weight.dtype, self._memory)
        return self._backend.linear(weight, bias, self._memory)

    def _blocks(self, names: list[str]) -> BlockWeight | None:
        """Return matrices one below the other in the file's blocks; None where these are not kept, or differ."""
        if self._quantization is not Quantization.GGUF or self._device.type != "cpu":
            return None
        kind, *others = {self._source.block_format(name) for name in names}
        if kind is None or others:
            return None
        if self._memory.is_filled:
            return BlockWeight.described(kind, sum(self._shapes[name][0] for name in names), self._shapes[names[0]][1])
        weight = BlockWeight.stacked([self._source.read_blocks(name) for name in names])
        if names != [_EMBEDDINGS]:  # which are looked up besides
            self._count(names)
        return weight

    def _tensor(self, name: str) -> torch.Tensor:
        return self._memory.keep(self._stacked([name]))

    def _stacked(self, names: list[str], *, in_scratch: bool = False) -> torch.Tensor:
        """Return tensors one below the other, in memory of their own, so that nothing keeps the file mapped.

        Each is cast straight into its place: a fresh page costs more than the arithmetic of dequantising it. What is in
        the scratch is valid until the next: between packed weights, freed buffers would leave holes that nothing fits.
        """
        num_rows = sum(self._shapes[name][0] for name in names)
        shape = (num_rows, *self._shapes[names[0]][1:])
        if self._memory.is_filled:
            return torch.empty(shape, dtype=self._dtype, device="meta")
        stacked = self._scratch_of(shape) if in_scratch else self._empty(shape)
        start = 0
        for name in names:
            end = start + self._shapes[name][0]
            self._source.copy(name, stacked[start:end])
            start = end
            self._count([name])
        return stacked

    def _scratch_of(self, shape: tuple[int, ...]) -> torch.Tensor:
        size = math.prod(shape)
        if size > len(self._scratch):
            self._scratch = self._empty((0,))  # gone before its successor comes
            self._scratch = self._empty((size,))
        return self._scratch[:size].view(shape)

    def _empty(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(shape, dtype=self._dtype, device=self._device)

    def _count(self, names: list[str]) -> None:
        self._num_read += sum(math.prod(self._shapes[name]) for name in names)
        if self._progress is not None:
            self._progress(self._num_read / self._total)
