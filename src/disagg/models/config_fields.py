"""Every field of a ``config.json`` that is known here, as data: computed, without effect, or computed for some values.

A field that changes numbers is understood or refused by name, never skipped. What Hugging Face's classes of the
supported architectures read was taken from transformers 5.23; the fields of other families stand here because a
model that needs them computes something else without them. A field in no table is named in a warning.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from disagg.base.errors import UnsupportedModelError
from disagg.models.config import Architecture

LLAMA, MISTRAL, QWEN2, QWEN3, MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE, GEMMA2, GEMMA3, PHI3, OLMO2, GRANITE = Architecture
_QWEN_MOE: Final = (QWEN2_MOE, QWEN3_MOE)
_EXPERT_MODELS: Final = (MIXTRAL, *_QWEN_MOE, OLMOE)
_GEMMA: Final = (GEMMA2, GEMMA3)
_SLIDES: Final = (MISTRAL, QWEN2, QWEN3, MIXTRAL, GEMMA2, GEMMA3, PHI3)
_NEVER_SLIDES: Final = (LLAMA, OLMO2, GRANITE, OLMOE)
_QK_NORM: Final = (QWEN3, QWEN3_MOE, GEMMA3, OLMO2, OLMOE)
_ALL: Final = frozenset(Architecture)


class Verdict(enum.Enum):
    """What becomes of a field."""

    READ = "read"
    """``hf_config`` reads it and the decoder follows it."""
    HARMLESS = "harmless"
    """Whatever its value, the logits stay the same."""
    LIMITED = "limited"
    """Only the values of ``allowed`` are computed; others are refused by name."""


@dataclass(frozen=True, slots=True)
class ConfigField:
    """One field, for some architectures. ``allowed`` holds for LIMITED ones, and null is always allowed."""

    name: str
    verdict: Verdict
    supported: str = ""
    """How a refusal ends: what can be served."""
    allowed: tuple[object, ...] = ()
    architectures: frozenset[Architecture] = _ALL


def _read(*names: str, only: tuple[Architecture, ...] = tuple(Architecture)) -> tuple[ConfigField, ...]:
    return tuple(ConfigField(name, Verdict.READ, architectures=frozenset(only)) for name in names)


def _harmless(*names: str, only: tuple[Architecture, ...] = tuple(Architecture)) -> tuple[ConfigField, ...]:
    return tuple(ConfigField(name, Verdict.HARMLESS, architectures=frozenset(only)) for name in names)


def _limited(
    *names: str, to: tuple[object, ...], supported: str, only: tuple[Architecture, ...] = tuple(Architecture)
) -> tuple[ConfigField, ...]:
    return tuple(ConfigField(name, Verdict.LIMITED, supported, to, frozenset(only)) for name in names)


_DENSE: Final = "0 (a dense model; the architecture's name says which experts are computed)"
_EXPERTS: Final = "0; the experts of Mixtral, Qwen2-MoE, Qwen3-MoE and OLMoE"


def _others(*families: Architecture) -> tuple[Architecture, ...]:
    return tuple(architecture for architecture in Architecture if architecture not in families)


_UNQUANTISED: Final = "unquantised safetensors (float32, bfloat16, float16), or any GGUF file"

CONFIG_FIELDS: Final = (
    # What decides shapes and arithmetic.
    *_read("architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *_read("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings"),
    *_read("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"),
    *_read("original_max_position_embeddings", "tie_word_embeddings", "bos_token_id", "eos_token_id"),
    *_read("dtype", "torch_dtype"),
    *_read("attention_bias", only=(LLAMA, QWEN3, QWEN3_MOE, OLMOE, *_GEMMA, OLMO2, GRANITE)),
    *_read("mlp_bias", only=(LLAMA, GRANITE)),
    *_read("layer_types", only=_others(PHI3)),
    *_read("sliding_window", "use_sliding_window", only=_SLIDES),
    *_read("max_window_layers", only=(QWEN2, QWEN3)),
    *_read("num_experts", "num_local_experts", "num_experts_per_tok", only=_EXPERT_MODELS),
    *_read("moe_intermediate_size", "decoder_sparse_step", "mlp_only_layers", only=_QWEN_MOE),
    *_read("norm_topk_prob", only=(*_QWEN_MOE, OLMOE)),
    *_read("shared_expert_intermediate_size", "qkv_bias", only=(QWEN2_MOE,)),
    *_read("sliding_window_pattern", "_sliding_window_pattern", "rope_local_base_freq", only=(GEMMA3,)),
    *_read("query_pre_attn_scalar", "final_logit_softcapping", only=_GEMMA),
    *_read("attn_logit_softcapping", only=(GEMMA2,)),
    *_read("embedding_multiplier", "residual_multiplier", "logits_scaling", only=(GRANITE,)),
    *_read("attention_multiplier", only=(GRANITE,)),
    # Computed for these values alone.
    *_limited(
        *("hidden_act", "hidden_activation", "activation_function"),
        to=("silu", "swish"),
        supported="'silu'",
        only=_others(*_GEMMA),
    ),
    *_limited(
        *("hidden_act", "hidden_activation", "activation_function"),
        to=("gelu_pytorch_tanh",),
        supported="'gelu_pytorch_tanh'",
        only=_GEMMA,
    ),
    *_limited("layer_types", to=(), supported="null (all layers slide, or none)", only=(PHI3,)),
    # Qwen2's biases are where its weights have them, whatever this says: a surplus or missing tensor is refused.
    *_harmless("attention_bias", only=(QWEN2, QWEN2_MOE)),
    *_limited("attention_bias", to=(False,), supported="False", only=(MISTRAL, MIXTRAL, PHI3)),
    *_limited("mlp_bias", to=(False,), supported="False", only=_others(LLAMA, GRANITE)),
    *_limited("bias", "o_bias", to=(False,), supported="'attention_bias' and 'mlp_bias' of Llama"),
    *_limited("qkv_bias", to=(False,), supported="False", only=_others(QWEN2_MOE)),
    *_limited(
        "sliding_window", to=(), supported="null (transformers ignores it here, vLLM does not)", only=_NEVER_SLIDES
    ),
    *_limited("use_sliding_window", to=(False,), supported="False", only=(*_NEVER_SLIDES, *_QWEN_MOE)),
    *_harmless("sliding_window", only=_QWEN_MOE),
    *_harmless("max_window_layers", only=_others(QWEN2, QWEN3)),
    *_limited("qk_norm", "use_qk_norm", to=(False,), supported="False", only=_others(*_QK_NORM)),
    *_limited("qk_norm", "use_qk_norm", to=(True,), supported="True", only=_QK_NORM),
    *_limited("qk_layernorm", to=(False,), supported="False"),
    *_limited("is_causal", "causal", to=(True,), supported="True"),
    *_limited("position_embedding_type", to=("rope", "rotary"), supported="'rope'"),
    # Another name or another kind of rotary embedding.
    *_limited("rotary_pct", "rotary_percent", "rope_pct", "rotary_emb_fraction", to=(1.0,), supported="1.0"),
    *_limited("rotary_emb_base", "rope_base", "rotary_dim", "rope_dim", to=(), supported="'rope_theta', whole heads"),
    *_limited("rope_local_base_freq", to=(), supported="one rotary embedding", only=_others(GEMMA3)),
    *_limited("rope_ratio", "mrope_section", to=(), supported="one rotary embedding"),
    *_limited("rope_interleave", "rope_interleaved", "rotary_interleaved", to=(False,), supported="halves (False)"),
    *_limited("no_rope_layers", "no_rope_layer_interval", "nope_layers", to=([], 0), supported="rope in every layer"),
    *_limited("alibi", "use_alibi", "use_mrope", to=(False,), supported="rotary embedding (False)"),
    # Factors and bounds that other families multiply with or clip at.
    *_limited(
        *("embedding_multiplier", "residual_multiplier", "logits_scaling"),
        to=(1,),
        supported="1.0",
        only=_others(GRANITE),
    ),
    *_limited("logit_scale", "lm_head_multiplier", "embedding_scale", "scale_emb", to=(1,), supported="1.0"),
    *_limited("key_multiplier", "attention_in_multiplier", "attention_out_multiplier", to=(1,), supported="1.0"),
    *_limited("attention_multiplier", to=(), supported="head_dim ** -0.5", only=_others(GRANITE)),
    *_limited("query_pre_attn_scalar", to=(), supported="head_dim ** -0.5", only=_others(*_GEMMA)),
    *_limited("attention_scale", to=(), supported="head_dim ** -0.5"),
    *_limited("scale_depth", "dim_model_base", "scale_width", "mup_multiplier", to=(), supported="null"),
    *_limited("scale_embeddings", "scale_embedding", "normalize_embedding", to=(False,), supported="False"),
    *_limited("attn_logit_softcapping", to=(0,), supported="null", only=_others(GEMMA2)),
    *_limited("final_logit_softcapping", to=(0,), supported="null", only=_others(*_GEMMA)),
    *_limited("attention_logit_cap", to=(0,), supported="null"),
    *_limited("attn_logit_softcap", "final_logit_softcap", "clip_qkv", "swiglu_limit", to=(0,), supported="null"),
    *_limited("attn_temperature_tuning", "attention_sinks", "use_sinks", to=(False, 0), supported="False"),
    *_limited("norm_after", "post_norm", "use_post_norm", "use_parallel_residual", to=(False,), supported="pre-norm"),
    *_limited("parallel_attn", "parallel_residual", "zero_centered_gamma", to=(False,), supported="False"),
    *_limited("norm_type", "normalization_type", to=("rmsnorm", "rms_norm", "rms"), supported="'rmsnorm'"),
    *_limited("use_bidirectional_attention", "is_encoder_decoder", to=(False,), supported="decoder-only text models"),
    # Another attention, another MLP.
    *_limited("attention_chunk_size", to=(0,), supported="'layer_types'"),
    *_limited(
        "sliding_window_pattern", "_sliding_window_pattern", to=(0,), supported="'layer_types'", only=_others(GEMMA3)
    ),
    *_limited(
        "kv_lora_rank", "q_lora_rank", "cross_attention_layers", "num_kv_shared_layers", to=(0, []), supported="0"
    ),
    *_limited("num_nextn_predict_layers", "num_mtp_layers", to=(0,), supported="0"),
    *_limited(
        "num_experts",
        "num_local_experts",
        "num_experts_per_tok",
        to=(0,),
        supported=_DENSE,
        only=_others(*_EXPERT_MODELS),
    ),
    *_limited("n_routed_experts", "moe_num_experts", "n_shared_experts", to=(0,), supported=_EXPERTS),
    *_limited("norm_topk_prob", to=(True,), supported="True", only=(MIXTRAL,)),
    *_limited("text_config", "vision_config", "audio_config", to=({},), supported="text models"),
    *_limited("pruned_heads", to=({}, []), supported="whole layers"),
    *_limited("compression_config", "quantization", "quantization_config", to=({},), supported=_UNQUANTISED),
    # Without effect on logits.
    *_harmless("_name_or_path", "name_or_path", "transformers_version", "initializer_range", "use_cache"),
    *_harmless("attention_dropout", "attention_probs_dropout_prob", "hidden_dropout", "hidden_dropout_prob"),
    *_harmless("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "residual_dropout", "embedding_dropout"),
    *_harmless("pad_token_id", "unk_token_id", "sep_token_id", "mask_token_id", "decoder_start_token_id"),
    *_harmless("output_attentions", "output_hidden_states", "return_dict", "use_return_dict", "torchscript"),
    *_harmless("chunk_size_feed_forward", "gradient_checkpointing", "id2label", "label2id", "problem_type"),
    *_harmless("finetuning_task", "task_specific_params", "tokenizer_class", "prefix", "is_decoder", "use_bfloat16"),
    *_harmless("cache_implementation", "default_theta"),
    *_harmless("add_cross_attention", "cross_attention_hidden_size", "tie_encoder_decoder", "tf_legacy_loss"),
    *_harmless("attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "use_flash_attn"),
    # Of training.
    *_harmless("output_router_logits", "router_aux_loss_coef", "router_jitter_noise"),
    # Slices of one product, added up: the same sum.
    *_harmless("pretraining_tp"),
    # Lengths that users of other programs read; 'max_position_embeddings' decides here.
    *_harmless("max_sequence_length", "max_seq_len", "seq_length", "n_positions", "model_max_length", "n_ctx"),
    # How 'intermediate_size' was once computed.
    *_harmless("multiple_of", "ffn_dim_multiplier"),
    # Defaults of sampling, read from here where there is no generation_config.json.
    *_harmless("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens", "do_sample"),
    *_harmless("max_length", "min_length", "num_beams", "num_beam_groups", "diversity_penalty", "length_penalty"),
    *_harmless("typical_p", "early_stopping", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
    *_harmless("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id"),
    *_harmless("forced_eos_token_id", "exponential_decay_length_penalty", "remove_invalid_values"),
    *_harmless("num_return_sequences", "output_scores", "return_dict_in_generate"),
)


def check_fields(entries: Mapping[str, object], architecture: Architecture) -> tuple[str, ...]:
    """Return the fields of ``entries`` that nothing here knows, null ones left out.

    Raises UnsupportedModelError, naming the first field whose value the decoder does not compute.
    """
    known = {field.name: field for field in CONFIG_FIELDS if architecture in field.architectures}
    unknown = []
    for name, value in entries.items():
        field = known.get(name)
        if value is None:
            continue
        if field is None:
            unknown.append(name)
        elif field.verdict is Verdict.LIMITED and value not in field.allowed:
            raise unsupported(architecture, *_shown(name, value), field.supported)
    return tuple(unknown)


def unsupported(architecture: Architecture, field: str, value: object, supported: str) -> UnsupportedModelError:
    """Return the refusal of one field's value: what it is, and what can be served."""
    return UnsupportedModelError(
        f"{architecture.value} with {field} = {value!r} is not supported; supported: {supported}"
    )


def _shown(name: str, value: object) -> tuple[str, object]:
    """Of a quantisation, its method says enough."""
    if isinstance(value, Mapping) and "quant_method" in value:
        return f"{name}.quant_method", value["quant_method"]
    return name, value
