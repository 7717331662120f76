"""What each model family has in common, as data; what differs within a family is in its ``config.json``.

Defaults are those of transformers 5.23, for what a file does not say.
"""

from dataclasses import dataclass
from typing import Final

from disagg.models.config import Activation, Architecture
from disagg.models.shape import NormPlacement, QkNorm


@dataclass(frozen=True, slots=True)
class FullEvery:
    """Every n-th layer sees everything, the others slide; ``field`` may give another n."""

    layers: int
    field: str | None = None


@dataclass(frozen=True, slots=True)
class FullBelow:
    """Layers slide from the one on that ``field`` names."""

    field: str
    default: int


@dataclass(frozen=True, slots=True)
class SlidingLayers:
    """Which layers slide where ``layer_types`` does not say, and how far they see where ``sliding_window`` does not.

    ``which``: None means all. ``switch`` is a field that must be true.
    """

    which: FullEvery | FullBelow | None = None
    default_window: int | None = None
    switch: str | None = None


@dataclass(frozen=True, slots=True)
class ModelFamily:
    """One architecture. ``sliding`` is None where no layer slides, ``qkv_bias`` where the file does not say."""

    model_types: tuple[str, ...]
    sliding: SlidingLayers | None = None
    has_layer_types: bool = True
    norm_placement: NormPlacement = NormPlacement.BEFORE
    qk_norm: QkNorm = QkNorm.NONE
    activation: Activation = Activation.SILU
    has_qkv_bias: bool = False
    qkv_bias_field: str | None = None
    """Which may say that there is none."""
    may_have_attention_bias: bool = False
    may_have_mlp_bias: bool = False
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_theta: float = 10_000.0
    sliding_rope_theta: float | None = None
    turns_parts_of_heads: bool = False
    fused_projections: bool = False
    norms_stored_less_one: bool = False
    scales_embeddings: bool = False
    """By the square root of their width."""
    query_pre_attn_scalar: float | None = None
    """Scores are divided by its square root, None: by that of ``head_dim``."""
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    has_multipliers: bool = False


_GEMMA_WINDOW: Final = 4096

FAMILIES: Final = {
    Architecture.LLAMA: ModelFamily(("llama",), may_have_attention_bias=True, may_have_mlp_bias=True),
    # MinistralForCausalLM is a Mistral whose layers slide or not one by one.
    Architecture.MISTRAL: ModelFamily(("mistral", "ministral"), SlidingLayers(default_window=4096)),
    Architecture.QWEN2: ModelFamily(
        ("qwen2",),
        SlidingLayers(FullBelow("max_window_layers", 28), 4096, switch="use_sliding_window"),
        has_qkv_bias=True,
    ),
    Architecture.QWEN3: ModelFamily(
        ("qwen3",),
        SlidingLayers(FullBelow("max_window_layers", 28), 4096, switch="use_sliding_window"),
        qk_norm=QkNorm.HEADS,
        may_have_attention_bias=True,
        head_dim=128,
    ),
    Architecture.MIXTRAL: ModelFamily(("mixtral",), SlidingLayers()),
    Architecture.QWEN2_MOE: ModelFamily(("qwen2_moe",), has_qkv_bias=True, qkv_bias_field="qkv_bias"),
    Architecture.QWEN3_MOE: ModelFamily(("qwen3_moe",), qk_norm=QkNorm.HEADS, may_have_attention_bias=True),
    Architecture.OLMOE: ModelFamily(
        ("olmoe",), has_layer_types=False, qk_norm=QkNorm.ROWS, may_have_attention_bias=True, rms_norm_eps=1e-5
    ),
    Architecture.GEMMA2: ModelFamily(
        ("gemma2",),
        SlidingLayers(FullEvery(2), _GEMMA_WINDOW),
        norm_placement=NormPlacement.AROUND,
        activation=Activation.GELU_TANH,
        may_have_attention_bias=True,
        head_dim=256,
        tie_word_embeddings=True,
        norms_stored_less_one=True,
        scales_embeddings=True,
        query_pre_attn_scalar=256,
        attention_softcap=50.0,
        logit_softcap=30.0,
    ),
    Architecture.GEMMA3: ModelFamily(
        ("gemma3_text",),
        SlidingLayers(FullEvery(6, "sliding_window_pattern"), _GEMMA_WINDOW),
        norm_placement=NormPlacement.AROUND,
        qk_norm=QkNorm.HEADS,
        activation=Activation.GELU_TANH,
        may_have_attention_bias=True,
        head_dim=256,
        tie_word_embeddings=True,
        rope_theta=1_000_000.0,
        sliding_rope_theta=10_000.0,
        norms_stored_less_one=True,
        scales_embeddings=True,
        query_pre_attn_scalar=256,
    ),
    Architecture.PHI3: ModelFamily(
        ("phi3",),
        SlidingLayers(),
        has_layer_types=False,
        rms_norm_eps=1e-5,
        turns_parts_of_heads=True,
        fused_projections=True,
    ),
    Architecture.OLMO2: ModelFamily(
        ("olmo2",),
        norm_placement=NormPlacement.AFTER,
        qk_norm=QkNorm.ROWS,
        may_have_attention_bias=True,
        rms_norm_eps=1e-5,
    ),
    Architecture.GRANITE: ModelFamily(
        ("granite",),
        may_have_attention_bias=True,
        may_have_mlp_bias=True,
        has_multipliers=True,
    ),
}
