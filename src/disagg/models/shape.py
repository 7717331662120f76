"""The sizes of a decoder-only transformer: what its parameters, its KV and its arithmetic cost."""

import enum
from collections.abc import Sequence
from typing import Final

import msgspec

from disagg.base.errors import ConfigurationError
from disagg.base.window_blocks import WindowBlocks

_SIZES: Final = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "max_position_embeddings",
)

_MOST_BLOCKS_EACH: Final = 8


class Experts(msgspec.Struct, frozen=True, kw_only=True):
    """The experts of one layer (Shazeer et al. 2017): gated MLPs, of which a router chooses a few for each token."""

    num_experts: int
    num_per_token: int
    intermediate_size: int
    """Of one expert."""
    normalize_weights: bool
    """The weights of the chosen experts add up to 1; False: they are the router's probabilities."""
    shared_intermediate_size: int = 0
    """Of the expert that every token passes besides, behind a gate of its own (Qwen2-MoE); 0: there is none."""

    @property
    def num_router_rows(self) -> int:
        """Rows of the router: one for each expert, and the shared expert's gate."""
        return self.num_experts + (self.shared_intermediate_size > 0)

    def num_read(self, num_tokens: int) -> float:
        """Return how many experts a step of ``num_tokens`` reads, on average over routers without a preference."""
        return self.num_experts * (1 - (1 - self.num_per_token / self.num_experts) ** num_tokens)


class NormPlacement(enum.Enum):
    """Where a layer normalises, around its attention and around its MLP alike."""

    BEFORE = "before"
    AFTER = "after"
    """What is added to the residual alone (OLMo 2)."""
    AROUND = "around"
    """Both (Gemma 2 and 3)."""

    @property
    def num_norms(self) -> int:
        """Norms of one layer."""
        return 4 if self is NormPlacement.AROUND else 2


class QkNorm(enum.Enum):
    """What of queries and keys is normalised as one, before the rotation."""

    NONE = "none"
    HEADS = "heads"
    """Each head by the same weights (Qwen3, Gemma 3)."""
    ROWS = "rows"
    """All heads of a token together (OLMo 2)."""


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes alone. ``ModelConfig`` adds what a decoder must know to compute; predictions need no more than this."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    sliding_windows: tuple[int | None, ...]
    """Per layer: position p sees p - w + 1 .. p; None sees everything before it."""
    gated_mlp: bool = True
    """Gate, up and down projection; False: up and down alone."""
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    norm_bias: bool = False
    qk_norm: QkNorm = QkNorm.NONE
    norm_placement: NormPlacement = NormPlacement.BEFORE
    num_learned_positions: int = 0
    """Rows of a trained table of positions; 0 where positions are rotations."""
    layer_experts: tuple[Experts | None, ...] = ()
    """Per layer: what stands in the place of its MLP; None: a dense layer. Empty: all layers are dense."""

    @property
    def q_size(self) -> int:
        """Rows of the query projection."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of the key (or the value) projection."""
        return self.num_kv_heads * self.head_dim

    @property
    def qk_norm_sizes(self) -> tuple[int, int]:
        """Weights of the norm of queries, and of that of keys."""
        match self.qk_norm:
            case QkNorm.NONE:
                return 0, 0
            case QkNorm.HEADS:
                return self.head_dim, self.head_dim
            case QkNorm.ROWS:
                return self.q_size, self.kv_size

    @property
    def mlp_input_size(self) -> int:
        """Rows of the MLP's first projections, gate and up together."""
        return (1 + self.gated_mlp) * self.intermediate_size

    @property
    def num_linear_parameters(self) -> int:
        """Weights of all matrix products, the vocabulary projection and every expert included."""
        return self._linear_parameters([0 if experts is None else experts.num_experts for experts in self._mlps])

    @property
    def num_active_parameters(self) -> int:
        """Those of them that one token passes through: of the experts, the ones that are chosen for it."""
        return self._linear_parameters([0 if experts is None else experts.num_per_token for experts in self._mlps])

    def num_read_parameters(self, num_tokens: int) -> int:
        """Return how many of them a step of ``num_tokens`` reads, each once; see ``Experts.num_read``."""
        chosen = [0 if experts is None else experts.num_read(num_tokens) for experts in self._mlps]
        return self._linear_parameters(chosen)

    @property
    def _mlps(self) -> tuple[Experts | None, ...]:
        return self.layer_experts or (None,) * self.num_layers

    def _linear_parameters(self, experts_counted: Sequence[float]) -> int:
        """Return the weights of the products, so many experts of each layer among them."""
        attention = self.hidden_size * (2 * self.q_size + 2 * self.kv_size)
        widths = 0.0
        for experts, count in zip(self._mlps, experts_counted, strict=True):
            if experts is None:
                widths += self.mlp_input_size + self.intermediate_size
            else:
                widths += experts.num_router_rows
                widths += 3 * (experts.shared_intermediate_size + count * experts.intermediate_size)
        return self.num_layers * attention + round(self.hidden_size * (widths + self.vocab_size))

    @property
    def num_parameters(self) -> int:
        """All trained parameters; tied embeddings count once."""
        norm = (1 + self.norm_bias) * self.hidden_size
        per_layer = self.norm_placement.num_norms * norm
        per_layer += (self.q_size + 2 * self.kv_size) * self.qkv_bias + self.hidden_size * self.attention_output_bias
        per_layer += (self.mlp_input_size + self.hidden_size) * self.mlp_bias
        per_layer += sum(self.qk_norm_sizes)
        embeddings = 0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size
        embeddings += self.num_learned_positions * self.hidden_size
        return self.num_linear_parameters + embeddings + self.num_layers * per_layer + norm

    @property
    def longest_window(self) -> int | None:
        """What the layers that slide see at most; None where none does, or sequences never outgrow it."""
        windows = [window for window in self.sliding_windows if window is not None]
        longest = max(windows, default=None)
        return None if longest is None or longest >= self.max_position_embeddings else longest

    @property
    def block_layers(self) -> int:
        """Layers that one KV block holds, see ``KvLayout``: those that see everything, or all where none slides.

        Never fewer than an eighth: a table of blocks for each is what it costs. Where so few slide that padding them to
        a block would take more than it gives, all.
        """
        if self.longest_window is None:
            return self.num_layers
        in_block = max(self.sliding_windows.count(None), -(-self.num_layers // _MOST_BLOCKS_EACH))
        return in_block if 2 * (self.num_layers - in_block) >= in_block else self.num_layers

    @property
    def pool_layers(self) -> tuple[int, ...]:
        """The place of each layer in KV blocks: those that slide come last."""
        in_pool = sorted(range(self.num_layers), key=lambda layer: self.sliding_windows[layer] is not None)
        return tuple(in_pool.index(layer) for layer in range(self.num_layers))

    @property
    def window_blocks(self) -> WindowBlocks | None:
        """The KV blocks of the layers that slide, where those have blocks of their own."""
        num_beside = -(-self.num_layers // self.block_layers) - 1
        return WindowBlocks(self.longest_window, num_beside) if self.longest_window and num_beside else None

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Return the bytes of keys and values of one token over all layers, at ``itemsize`` bytes per element."""
        return 2 * self.num_layers * self.kv_size * itemsize

    def kv_bytes(self, num_tokens: int, itemsize: int, block_size: int = 64) -> int:
        """Return the bytes of the KV blocks of a sequence, as far as they are needed after so many tokens."""
        num_blocks, window = -(-num_tokens // block_size), self.window_blocks
        if window is not None:
            num_blocks += window.num_beside(num_tokens, block_size, 0, num_blocks)
        return num_blocks * block_size * 2 * self.block_layers * self.kv_size * itemsize

    def linear_flops(self, num_tokens: int, num_logit_rows: int) -> int:
        """Return the floating-point operations of the matrix products with weights.

        ``num_logit_rows`` of the ``num_tokens`` go through the vocabulary projection.
        """
        vocabulary = self.vocab_size * self.hidden_size
        return 2 * (num_tokens * (self.num_active_parameters - vocabulary) + num_logit_rows * vocabulary)

    def attention_flops(self, num_tokens: int, context_len: int) -> int:
        """Return the floating-point operations of Q K^T and P V over all layers.

        ``num_tokens`` new tokens end at ``context_len``; causality and each layer's sliding window are counted.
        """
        return sum(4 * self.q_size * _visible_pairs(num_tokens, context_len, window) for window in self.sliding_windows)


def check_sizes(shape: ModelShape, source: str) -> None:
    """Raise ConfigurationError where sizes cannot be or contradict each other."""
    for name in _SIZES:
        if getattr(shape, name) < 1:
            raise ConfigurationError(f"{source}: {name} must be at least 1, got {getattr(shape, name)}")
    if shape.num_heads % shape.num_kv_heads:
        raise ConfigurationError(
            f"{source}: {shape.num_heads} query heads are not a multiple of {shape.num_kv_heads} KV heads"
        )
    for experts in shape.layer_experts:
        if experts is not None and not 1 <= experts.num_per_token <= experts.num_experts:
            raise ConfigurationError(
                f"{source}: {experts.num_per_token} of {experts.num_experts} experts for each token cannot be: "
                "the number of experts per token must be within 1 and the number of experts"
            )
        if experts is not None and (experts.intermediate_size < 1 or experts.shared_intermediate_size < 0):
            raise ConfigurationError(
                f"{source}: the experts' intermediate_size must be at least 1, got {experts.intermediate_size} "
                f"(shared: {experts.shared_intermediate_size})"
            )


def _visible_pairs(num_tokens: int, context_len: int, window: int | None) -> int:
    """Sum over the last ``num_tokens`` positions of how many positions each one sees."""
    first = context_len - num_tokens + 1
    if window is None or context_len <= window:
        return num_tokens * (first + context_len) // 2
    growing = max(0, window - first + 1)
    return growing * (first + window) // 2 + (num_tokens - growing) * window if growing else num_tokens * window
