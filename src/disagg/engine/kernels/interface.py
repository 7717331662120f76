"""What the decoder asks of a kernel backend. One implementation is native C++, one is plain PyTorch.

Every tensor is on the backend's device. T is the number of new tokens in the step over all sequences, S the number
of sequences, Hq and Hk the numbers of query and KV heads, D the head dimension.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from disagg.cache.layout import KvFormat
from disagg.engine.kernels.blocks import BlockWeight
from disagg.engine.kernels.int8 import Int8Weight
from disagg.engine.kernels.weight_memory import PRIVATE, WeightMemory
from disagg.models.config import Activation

MOST_TABLES: Final = 8
"""Of blocks, in one step: see ``ModelShape.block_layers``."""


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step's sequences, concatenated. A decode is a sequence with one new token; a prefill chunk has more.

    ``query_start``: int32 [S + 1], first row of each sequence, then T.
    ``context_lens``: int32 [S], tokens in the KV cache once this step's tokens are written.
    ``block_tables``: int32 [S, max blocks], KV blocks of each sequence in order; unused entries are 0.
    ``token_ids``: int64 [T]. ``positions``: int32 [T]; row r of sequence s is at position
    ``context_lens[s] - (query_start[s + 1] - query_start[s]) + r``.
    ``logit_rows``: int64 [L], the rows of the T whose logits are wanted.
    ``max_query_len`` and ``max_context_len`` are Python ints, so that no backend must read them back.
    ``most_likely``: int64 [L], where it is wanted: a decoder that finds on its way the first of the largest of each row
    of logits writes it there, NOT_FINITE where that is not finite. Others leave it as it is.

    ``progress`` is the address of a word to which a decoder may add one for each layer when its keys and values are
    written; 0 where nobody reads it.

    Where layers have blocks of their own, ``layer_tables`` says of each layer whose: those of ``block_tables``, 0, or
    from 1 on of ``others``, the same step over other blocks. Entries behind a layer's window are 0.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    query_start: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor
    logit_rows: torch.Tensor
    max_query_len: int
    max_context_len: int
    most_likely: npt.NDArray[np.int64] | None = None
    progress: int = 0
    layer_tables: tuple[int, ...] = ()
    others: tuple["StepBatch", ...] = ()

    @property
    def tables(self) -> tuple["StepBatch", ...]:
        """The step over the blocks of each kind."""
        return (self, *self.others)

    def of_layer(self, layer: int) -> "StepBatch":
        """Return the step over the blocks that a layer is in."""
        table = self.layer_tables[layer] if self.layer_tables else 0
        return self.others[table - 1] if table else self


class Linear(Protocol):
    """A weight matrix in the form that its backend multiplies fastest."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x @ weight.T + bias``; x is [rows, in_features]."""


@dataclass(frozen=True, slots=True)
class DenseMlp:
    """A gated MLP: ``down(activation(gate(x)) * up(x))``, gate and up stacked into one projection."""

    gate_up: Linear
    down: Linear
    activation: Activation = Activation.SILU


@dataclass(frozen=True, slots=True)
class SparseMlp:
    """A mixture of experts. ``router`` gives one logit for each expert, then one for the shared expert's gate.

    Each token passes the ``num_per_token`` experts of the highest softmax, weighted by it; with ``normalize_weights``
    these weights add up to 1. ``shared`` is passed by all, weighted by the sigmoid of its logit.
    """

    router: Linear
    experts: tuple[DenseMlp, ...]
    num_per_token: int
    normalize_weights: bool
    shared: DenseMlp | None

    @property
    def dense_parts(self) -> tuple[DenseMlp, ...]:
        """The experts, then the shared one."""
        return self.experts if self.shared is None else (*self.experts, self.shared)


Mlp = DenseMlp | SparseMlp


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. Norms are [hidden], and None where the model has none.

    ``attention_norm`` and ``mlp_norm`` are of what attention and MLP read, the ``output_norm``s of what they give.
    ``q_norm`` and ``k_norm`` are as in ``KernelBackend.rope_and_write_kv``.
    """

    attention_norm: torch.Tensor | None
    qkv: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    attention_output: Linear
    mlp_norm: torch.Tensor | None
    mlp: Mlp
    attention_output_norm: torch.Tensor | None = None
    mlp_output_norm: torch.Tensor | None = None

    @property
    def linears(self) -> Iterator[Linear]:
        """Every projection of the layer."""
        yield from (self.qkv, self.attention_output)
        if isinstance(self.mlp, SparseMlp):
            yield self.mlp.router
        for part in (self.mlp,) if isinstance(self.mlp, DenseMlp) else self.mlp.dense_parts:
            yield from (part.gate_up, part.down)


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """A whole decoder, packed. ``embeddings`` is [vocab, hidden]; ``head`` projects onto the vocabulary."""

    embeddings: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    head: Linear
    num_bytes: int = 0
    """What all of this takes in memory, as far as it was counted."""


@dataclass(frozen=True, slots=True)
class LayerSettings:
    """What may differ from layer to layer. ``cos_sin`` is as in ``KernelBackend.rope_and_write_kv``.

    ``sliding_window`` is None where a layer sees everything.
    """

    cos_sin: torch.Tensor
    sliding_window: int | None = None


@dataclass(frozen=True, slots=True)
class LogitBounds:
    """What becomes of logits: cap * tanh(multiplier * logit / cap), or just the product without a cap."""

    multiplier: float = 1.0
    softcap: float | None = None

    @property
    def change_nothing(self) -> bool:
        """Whether logits stay as they are."""
        return self.multiplier == 1.0 and self.softcap is None


@dataclass(frozen=True, slots=True)
class DecoderSettings:
    """A decoder beside its weights; see ``ModelConfig`` for what its fields mean."""

    num_heads: int
    num_kv_heads: int
    eps: float
    scale: float
    layers: tuple[LayerSettings, ...]
    softcap: float | None = None
    residual_multiplier: float = 1.0
    logits: LogitBounds = LogitBounds()


class DecoderStack(Protocol):
    """A decoder over a paged KV pool, from token ids to logits."""

    counts_layers: bool
    """Whether it counts in ``StepBatch.progress``."""

    def __call__(self, kv: torch.Tensor | Sequence[torch.Tensor], batch: StepBatch) -> torch.Tensor:
        """Pass a step's tokens through the decoder; write their K and V into ``kv[layer]``.

        Returns the logits of the rows ``batch.logit_rows``, [L, vocab], in the weights' element type.
        """


class KernelBackend(Protocol):
    """The operations of a decoder layer, over paged KV blocks."""

    name: str
    kv_format: KvFormat
    keeps_weights: bool
    """Whether ``linear`` keeps the tensor that it is given, rather than a copy in another order."""

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None, memory: WeightMemory = PRIVATE) -> Linear:
        """Pack ``weight`` [out_features, in_features] into ``memory``; the caller may drop its own reference."""

    def int8_linear(
        self, weight: Int8Weight, bias: torch.Tensor | None, dtype: torch.dtype, memory: WeightMemory = PRIVATE
    ) -> Linear:
        """Pack an int8 weight for activations of ``dtype``; the caller may drop its own reference."""

    def block_linear(
        self, weight: BlockWeight, bias: torch.Tensor | None, dtype: torch.dtype, memory: WeightMemory = PRIVATE
    ) -> Linear:
        """Pack a weight in blocks for activations of ``dtype``; the caller may drop its own reference."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Return x / rms(x) * weight; x is [T, hidden]. The mean of squares is taken in float32."""

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
        """Add x times ``multiplier`` to ``residual`` in place, then return the normalised sum.

        x is normalised by ``x_norm`` first, where given, and may be overwritten. Without ``weight`` the residual itself
        is returned.
        """

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
        """Normalise (qk-norm, where given) and rotate Q and K, write K and V into the pool, return Q [T, Hq, D].

        ``qkv`` is [T, (Hq + 2 Hk) * D]; ``cos_sin`` float32 [max position, R], cosines of the R / 2 frequencies, then
        sines (Hugging Face's half-split rotation of the first R of the D elements of a head); ``kv_layer``
        [num_blocks, 2, Hk, block_size * D] is one layer of the pool in the backend's ``kv_format``. ``q_norm`` is [D],
        and each head is normalised by it, or [Hq * D], and all heads of a token are normalised together; ``k_norm``
        likewise.
        """

    def attention(
        self,
        q: torch.Tensor,
        kv_layer: torch.Tensor,
        batch: StepBatch,
        scale: float,
        sliding_window: int | None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Return causal attention of Q [T, Hq, D] over each sequence's blocks, as [T, Hq * D].

        With ``sliding_window`` w, position p sees positions p - w + 1 .. p. Scores are products times ``scale``, and
        bounded by cap * tanh(score / cap) where there is a ``softcap``.
        """

    def gate(self, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
        """Return activation(left half) * right half; gate_up is [T, 2 * intermediate]."""

    def bound_logits(self, logits: torch.Tensor, bounds: LogitBounds) -> None:
        """Multiply and bound logits [L, vocab] in place."""


@runtime_checkable
class FusesDecoder(Protocol):
    """A backend that runs a decoder by itself, faster than its operations called one by one."""

    def fuse_decoder(self, weights: DecoderWeights, settings: DecoderSettings) -> DecoderStack | None:
        """Return the decoder as one operation, or None where a part of it is none of the backend's own."""


@dataclass(frozen=True, slots=True)
class DrawSettings:
    """How each of B rows is sampled, as in ``SamplingParams``. ``position``: of the next token in its sequence."""

    temperature: npt.NDArray[np.float64]
    top_p: npt.NDArray[np.float64]
    min_p: npt.NDArray[np.float64]
    top_k: npt.NDArray[np.int32]
    seed: npt.NDArray[np.uint64]
    position: npt.NDArray[np.uint64]


NOT_FINITE: Final = -1
"""In the place of a token: the row has no finite maximum."""
UNDECIDED: Final = -2
"""In the place of a token: it takes more than the row's likely tokens to draw it."""


@runtime_checkable
class ChoosesTokens(Protocol):
    """A backend that chooses tokens by itself, faster than the sampler's NumPy, and by the same rules.

    ``logits`` is [B, vocab] in any element type of the backend; results are int64 [B].
    """

    def most_likely(self, logits: torch.Tensor) -> npt.NDArray[np.int64]:
        """Return the first of the largest of each row, or NOT_FINITE; a NaN counts as the largest."""

    def draw(self, logits: torch.Tensor, settings: DrawSettings, head_floor: float) -> npt.NDArray[np.int64]:
        """Draw a token of each row, or return NOT_FINITE or UNDECIDED for it.

        Tokens with log-probabilities above ``head_floor`` are likely, see the sampler.
        """

    def forbid(self, logits: torch.Tensor, rows: npt.NDArray[np.int64], allowed: npt.NDArray[np.uint32]) -> None:
        """Give minus infinity to what is not allowed, in place.

        ``allowed`` [len(rows), vocab / 32, rounded up] has a bit for each token, the lowest of a word first.
        """
