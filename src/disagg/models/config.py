"""What a decoder must know of a model to compute it, beside its sizes.

Read by ``hf_config`` from a ``config.json`` and by ``gguf_config`` from a GGUF file's metadata.
"""

import enum

import msgspec

from disagg.models.shape import ModelShape


class Architecture(enum.Enum):
    """Model families that the decoder computes; the values are Hugging Face's class names."""

    LLAMA = "LlamaForCausalLM"
    MISTRAL = "MistralForCausalLM"
    QWEN2 = "Qwen2ForCausalLM"
    QWEN3 = "Qwen3ForCausalLM"
    MIXTRAL = "MixtralForCausalLM"
    QWEN2_MOE = "Qwen2MoeForCausalLM"
    QWEN3_MOE = "Qwen3MoeForCausalLM"
    OLMOE = "OlmoeForCausalLM"
    GEMMA2 = "Gemma2ForCausalLM"
    GEMMA3 = "Gemma3ForCausalLM"
    PHI3 = "Phi3ForCausalLM"
    OLMO2 = "Olmo2ForCausalLM"
    GRANITE = "GraniteForCausalLM"


SUPPORTED_MODELS = (
    "Llama 2, 3 and 3.x and SmolLM2 (LlamaForCausalLM), Mistral (MistralForCausalLM), "
    "Qwen2 and Qwen2.5 (Qwen2ForCausalLM), dense Qwen3 (Qwen3ForCausalLM), Gemma 2 (Gemma2ForCausalLM), "
    "Gemma 3's text models (Gemma3ForCausalLM), Phi-3 and Phi-4 (Phi3ForCausalLM), OLMo 2 (Olmo2ForCausalLM), "
    "dense Granite 3 (GraniteForCausalLM), "
    "and the mixtures of experts Mixtral (MixtralForCausalLM), Qwen1.5-MoE and Qwen2-MoE (Qwen2MoeForCausalLM), "
    "Qwen3-MoE (Qwen3MoeForCausalLM), OLMoE (OlmoeForCausalLM)"
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
    """One divisor per frequency: how a GGUF file states Llama 3.1's scaling (tensor ``rope_freqs.weight``).

    ``attention_factor`` multiplies cosines and sines.
    """

    divisors: tuple[float, ...]
    attention_factor: float = 1.0


class LongRope(msgspec.Struct, frozen=True, kw_only=True, tag="longrope"):
    """LongRoPE (Ding et al. 2024): one divisor per frequency, others for long sequences than for short ones."""

    short_divisors: tuple[float, ...]
    long_divisors: tuple[float, ...]
    original_max_position_embeddings: int
    attention_factor: float

    def for_length(self, length: int) -> FactorsRope:
        """Return the divisors for all sequences, where the longest may have so many tokens.

        Those that are short get the long ones' divisors too, as in vLLM: what is in the KV cache cannot turn.
        """
        is_long = length > self.original_max_position_embeddings
        divisors = self.long_divisors if is_long else self.short_divisors
        return FactorsRope(divisors=divisors, attention_factor=self.attention_factor)


RopeScaling = LinearRope | Llama3Rope | YarnRope | FactorsRope | LongRope


class Activation(enum.Enum):
    """What the gate of the MLP goes through."""

    SILU = "silu"
    GELU_TANH = "gelu_pytorch_tanh"
    """GELU in its tanh approximation."""


class ModelConfig(ModelShape, frozen=True, kw_only=True):
    """Everything that decides a decoder's arithmetic and its vocabulary's special ids."""

    architecture: Architecture
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    rotary_dim: int
    """How much of each head's beginning turns; even, at most ``head_dim``."""
    sliding_rope_theta: float | None = None
    """The base in layers with a sliding window, which are not scaled then; None: they turn as the others do."""
    activation: Activation = Activation.SILU
    attention_scale: float
    """Factor of the products of queries and keys."""
    attention_softcap: float | None = None
    """Scores become cap * tanh(score / cap)."""
    logit_softcap: float | None = None
    """The same for logits."""
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    """Factor of what attention and MLP add to the residual."""
    logit_multiplier: float = 1.0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    fused_projections: bool = False
    """Queries, keys and values are one tensor in the file, gate and up projection another."""
    norms_stored_less_one: bool = False
    """In the file, weights of norms are what is added to 1."""
    stored_dtype: str = "unknown"
    """Element type in the file, for the user's information."""

    @property
    def class_name(self) -> str:
        """Hugging Face's class."""
        return self.architecture.value

    def for_length(self, max_model_len: int | None) -> "ModelConfig":
        """Return the configuration that computes sequences of up to so many tokens, by default as many as it can."""
        if not isinstance(self.rope_scaling, LongRope):
            return self
        length = self.max_position_embeddings if max_model_len is None else max_model_len
        return msgspec.structs.replace(self, rope_scaling=self.rope_scaling.for_length(length))
