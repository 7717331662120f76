"""The shape of a decoder-only transformer, as every room that computes or predicts needs it.

Read by ``hf_config`` from a ``config.json`` and by ``gguf_config`` from a GGUF file's metadata.
"""

import enum

import msgspec


class Architecture(enum.Enum):
    """Model families that the decoder computes; the values are Hugging Face's class names."""

    LLAMA = "LlamaForCausalLM"
    MISTRAL = "MistralForCausalLM"
    QWEN2 = "Qwen2ForCausalLM"
    QWEN3 = "Qwen3ForCausalLM"


SUPPORTED_MODELS = (
    "Llama 2, 3 and 3.x and SmolLM2 (LlamaForCausalLM), Mistral (MistralForCausalLM), "
    "Qwen2 and Qwen2.5 (Qwen2ForCausalLM), dense Qwen3 (Qwen3ForCausalLM)"
)
"""What a refusal tells the user to choose from."""


class LinearRope(msgspec.Struct, frozen=True, kw_only=True, tag="linear"):
    """Position interpolation: every frequency divided by ``factor``."""

    factor: float


class Llama3Rope(msgspec.Struct, frozen=True, kw_only=True, tag="llama3"):
    """Llama 3.1's scaling: low frequencies divided by ``factor``, high ones kept, a smooth passage between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


class YarnRope(msgspec.Struct, frozen=True, kw_only=True, tag="yarn"):
    """YaRN (Peng et al. 2023). ``attention_factor`` multiplies cosines and sines."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


class FactorsRope(msgspec.Struct, frozen=True, kw_only=True, tag="factors"):
    """One divisor per frequency: how a GGUF file states Llama 3.1's scaling (tensor ``rope_freqs.weight``)."""

    divisors: tuple[float, ...]


RopeScaling = LinearRope | Llama3Rope | YarnRope | FactorsRope


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that decides a decoder's arithmetic and its vocabulary's special ids."""

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int
    sliding_windows: tuple[int | None, ...]
    """Per layer: position p sees p - w + 1 .. p; None sees everything before it."""
    tie_word_embeddings: bool
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMS norm of each query and key head before the rotation (Qwen3)."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    stored_dtype: str = "unknown"
    """Element type in the file, for the user's information."""

    @property
    def q_size(self) -> int:
        """Rows of the query projection."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of the key (or the value) projection."""
        return self.num_kv_heads * self.head_dim

    @property
    def num_linear_parameters(self) -> int:
        """Weights of the matrix products that one token passes through, the vocabulary projection included."""
        attention = self.hidden_size * (2 * self.q_size + 2 * self.kv_size)
        mlp = 3 * self.hidden_size * self.intermediate_size
        return self.num_layers * (attention + mlp) + self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """All trained parameters; tied embeddings count once."""
        per_layer = 2 * self.hidden_size
        per_layer += (self.q_size + 2 * self.kv_size) * self.qkv_bias + self.hidden_size * self.attention_output_bias
        per_layer += (2 * self.intermediate_size + self.hidden_size) * self.mlp_bias
        per_layer += 2 * self.head_dim * self.qk_norm
        embeddings = 0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size
        return self.num_linear_parameters + embeddings + self.num_layers * per_layer + self.hidden_size

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


def _visible_pairs(num_tokens: int, context_len: int, window: int | None) -> int:
    """Sum over the last ``num_tokens`` positions of how many positions each one sees."""
    first = context_len - num_tokens + 1
    if window is None or context_len <= window:
        return num_tokens * (first + context_len) // 2
    growing = max(0, window - first + 1)
    return growing * (first + window) // 2 + (num_tokens - growing) * window if growing else num_tokens * window
