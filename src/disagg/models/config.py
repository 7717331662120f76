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


SUPPORTED_MODELS = (
    "Llama 2, 3 and 3.x and SmolLM2 (LlamaForCausalLM), Mistral (MistralForCausalLM), "
    "Qwen2 and Qwen2.5 (Qwen2ForCausalLM), dense Qwen3 (Qwen3ForCausalLM), "
    "and the mixtures of experts Mixtral (MixtralForCausalLM), Qwen1.5-MoE and Qwen2-MoE (Qwen2MoeForCausalLM), "
    "Qwen3-MoE (Qwen3MoeForCausalLM)"
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


class ModelConfig(ModelShape, frozen=True, kw_only=True):
    """Everything that decides a decoder's arithmetic and its vocabulary's special ids."""

    architecture: Architecture
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    stored_dtype: str = "unknown"
    """Element type in the file, for the user's information."""
