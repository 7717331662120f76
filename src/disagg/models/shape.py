"""The sizes of a decoder-only transformer: what its parameters, its KV and its arithmetic cost."""

from typing import Final

import msgspec

from disagg.base.errors import ConfigurationError

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
    qk_norm: bool = False
    """RMS norm of each query and key head before the rotation (Qwen3)."""
    num_learned_positions: int = 0
    """Rows of a trained table of positions; 0 where positions are rotations."""

    @property
    def q_size(self) -> int:
        """Rows of the query projection."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of the key (or the value) projection."""
        return self.num_kv_heads * self.head_dim

    @property
    def mlp_input_size(self) -> int:
        """Rows of the MLP's first projections, gate and up together."""
        return (1 + self.gated_mlp) * self.intermediate_size

    @property
    def num_layer_weights(self) -> int:
        """Weights of one layer's matrix products."""
        attention = self.hidden_size * (2 * self.q_size + 2 * self.kv_size)
        return attention + self.hidden_size * (self.mlp_input_size + self.intermediate_size)

    @property
    def num_linear_parameters(self) -> int:
        """Weights of the matrix products that one token passes through, the vocabulary projection included."""
        return self.num_layers * self.num_layer_weights + self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """All trained parameters; tied embeddings count once."""
        norm = (1 + self.norm_bias) * self.hidden_size
        per_layer = 2 * norm
        per_layer += (self.q_size + 2 * self.kv_size) * self.qkv_bias + self.hidden_size * self.attention_output_bias
        per_layer += (self.mlp_input_size + self.hidden_size) * self.mlp_bias
        per_layer += 2 * self.head_dim * self.qk_norm
        embeddings = 0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size
        embeddings += self.num_learned_positions * self.hidden_size
        return self.num_linear_parameters + embeddings + self.num_layers * per_layer + norm

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Return the bytes of keys and values of one token over all layers, at ``itemsize`` bytes per element."""
        return 2 * self.num_layers * self.kv_size * itemsize

    def linear_flops(self, num_tokens: int, num_logit_rows: int) -> int:
        """Return the floating-point operations of the matrix products with weights.

        ``num_logit_rows`` of the ``num_tokens`` go through the vocabulary projection.
        """
        vocabulary = self.vocab_size * self.hidden_size
        return 2 * (num_tokens * (self.num_linear_parameters - vocabulary) + num_logit_rows * vocabulary)

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


def _visible_pairs(num_tokens: int, context_len: int, window: int | None) -> int:
    """Sum over the last ``num_tokens`` positions of how many positions each one sees."""
    first = context_len - num_tokens + 1
    if window is None or context_len <= window:
        return num_tokens * (first + context_len) // 2
    growing = max(0, window - first + 1)
    return growing * (first + window) // 2 + (num_tokens - growing) * window if growing else num_tokens * window
