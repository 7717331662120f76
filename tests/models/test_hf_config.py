"""config.json: what is read, what is refused and in which words."""

from typing import Any

import msgspec
import pytest

from disagg.base.errors import ConfigurationError, UnsupportedModelError
from disagg.models.config import Architecture, FactorsRope, LinearRope, Llama3Rope, ModelConfig, YarnRope
from disagg.models.hf_config import config_from_hf

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "bos_token_id": 128_000,
    "eos_token_id": [128_001, 128_008, 128_009],
    "torch_dtype": "bfloat16",
}
LLAMA3_SCALING = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config_of(**changes: Any) -> ModelConfig:
    return config_from_hf({name: value for name, value in (LLAMA | changes).items() if value is not ...})


class TestReading:
    def test_llama_3_2_1b(self) -> None:
        config = config_of(rope_scaling={"rope_type": "llama3", **LLAMA3_SCALING})

        assert config.architecture is Architecture.LLAMA
        assert config.rope_scaling == Llama3Rope(**LLAMA3_SCALING)
        assert config.eos_token_ids == (128_001, 128_008, 128_009)
        assert config.num_parameters == 1_235_814_400
        assert config.kv_bytes_per_token(itemsize=2) == 32 * 1024

    def test_both_spellings_of_rope_mean_the_same(self) -> None:
        old = config_of(rope_scaling={"rope_type": "llama3", **LLAMA3_SCALING})
        new = config_of(
            rope_theta=...,
            rope_parameters={"rope_type": "llama3", "rope_theta": 500_000.0, **LLAMA3_SCALING},
        )

        assert old == new

    def test_old_key_type_for_the_rope_type(self) -> None:
        assert config_of(rope_scaling={"type": "linear", "factor": 2}).rope_scaling == LinearRope(factor=2.0)

    def test_yarn_derives_its_attention_factor(self) -> None:
        scaling = config_of(
            rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}
        ).rope_scaling

        assert isinstance(scaling, YarnRope)
        assert scaling.attention_factor == pytest.approx(1.1386294)

    def test_absent_kv_heads_and_head_dim_follow_from_the_heads(self) -> None:
        config = config_of(num_key_value_heads=..., head_dim=...)

        assert (config.num_kv_heads, config.head_dim) == (32, 64)

    def test_both_files_end_sequences(self) -> None:
        config = config_from_hf(LLAMA, {"eos_token_id": [7, 128_001]})

        assert config.eos_token_ids == (7, 128_001, 128_008, 128_009)

    def test_dynamic_scaling_changes_nothing_within_the_limit(self) -> None:
        assert config_of(rope_scaling={"type": "dynamic", "factor": 2.0}).rope_scaling is None

    def test_a_rope_section_of_old_replaces_the_new_one(self) -> None:
        """As in transformers 5: what a user adds to a file that transformers wrote."""
        config = config_of(rope_parameters={"rope_type": "default"}, rope_scaling={"type": "linear", "factor": 2.0})

        assert (config.rope_theta, config.rope_scaling) == (500_000.0, LinearRope(factor=2.0))

    def test_qwen2_has_qkv_biases_and_no_other(self) -> None:
        config = config_of(architectures=["Qwen2ForCausalLM"])

        assert (config.qkv_bias, config.attention_output_bias, config.mlp_bias) == (True, False, False)

    def test_qwen3_has_norms_of_queries_and_keys(self) -> None:
        config = config_of(architectures=["Qwen3ForCausalLM"], head_dim=...)

        assert config.qk_norm
        assert config.head_dim == 128

    def test_a_config_survives_serialisation(self) -> None:
        config = config_of(rope_scaling={"rope_type": "llama3", **LLAMA3_SCALING})

        assert msgspec.json.decode(msgspec.json.encode(config), type=ModelConfig) == config


class TestSlidingWindows:
    def test_mistral_slides_everywhere(self) -> None:
        config = config_of(architectures=["MistralForCausalLM"], sliding_window=4096)

        assert config.sliding_windows == (4096,) * 16

    def test_mistral_with_null_sees_everything(self) -> None:
        config = config_of(architectures=["MistralForCausalLM"], sliding_window=None)

        assert config.sliding_windows == (None,) * 16

    def test_mistral_that_says_nothing_slides(self) -> None:
        """transformers' default for the family: a window of 4096."""
        assert config_of(architectures=["MistralForCausalLM"]).sliding_windows == (4096,) * 16

    def test_mistral_follows_layer_types(self) -> None:
        kinds = ["full_attention", "sliding_attention"] * 8
        config = config_of(architectures=["MistralForCausalLM"], sliding_window=64, layer_types=kinds)

        assert config.sliding_windows == (None, 64) * 8

    def test_qwen_slides_only_when_told_to(self) -> None:
        config = config_of(architectures=["Qwen2ForCausalLM"], sliding_window=4096, use_sliding_window=False)

        assert set(config.sliding_windows) == {None}

    def test_qwen_slides_from_max_window_layers_on(self) -> None:
        config = config_of(
            architectures=["Qwen2ForCausalLM"], sliding_window=64, use_sliding_window=True, max_window_layers=14
        )

        assert config.sliding_windows == (None,) * 14 + (64, 64)

    def test_layer_types_win(self) -> None:
        kinds = ["full_attention", "sliding_attention"] * 8
        config = config_of(
            architectures=["Qwen3ForCausalLM"], sliding_window=64, use_sliding_window=True, layer_types=kinds
        )

        assert config.sliding_windows == (None, 64) * 8


class TestRefusals:
    """Each names the architecture, the field, its value and what is supported."""

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            (
                {"architectures": ["DeepseekV3ForCausalLM"]},
                ["DeepseekV3ForCausalLM", "'architectures'", "Qwen3ForCausalLM"],
            ),
            ({"architectures": ["BertModel"]}, ["BertModel", "LlamaForCausalLM"]),
            (
                {"quantization_config": {"quant_method": "awq"}},
                ["LlamaForCausalLM", "quantization_config.quant_method", "'awq'", "GGUF"],
            ),
            ({"hidden_act": "gelu"}, ["LlamaForCausalLM", "hidden_act", "'gelu'", "'silu'"]),
            (
                {"rope_scaling": {"rope_type": "proportional", "factor": 2.0}},
                ["rope_type", "'proportional'", "'linear'", "'llama3'", "'yarn'"],
            ),
            ({"rope_scaling": {"type": None}}, ["rope_type", "None", "'default'"]),
            ({"rope_scaling": {"rope_type": None, "factor": 2.0}}, ["rope_type", "None", "'yarn'"]),
            ({"rope_scaling": {"rope_type": "su", "factor": 2.0}}, ["rope_type", "'su'"]),
            ({"rope_scaling": {"factor": 2.0}}, ["'factor'", "'default'", "2.0"]),
            ({"rope_scaling": {"type": "linear", "factor": 2.0, "alpha": 1000.0}}, ["'alpha'", "'linear'", "1000.0"]),
            ({"rope_scaling": {"type": "linear", "factor": 2.0, "attention_factor": 2.0}}, ["'attention_factor'"]),
            ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["'full_attention'", "'default'"]),
            ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, ["partial_rotary_factor"]),
            ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
            ({"num_local_experts": 8}, ["num_local_experts", "8", "dense"]),
            ({"is_encoder_decoder": True}, ["is_encoder_decoder", "decoder-only"]),
        ],
    )
    def test_unsupported(self, changes: dict[str, Any], words: list[str]) -> None:
        with pytest.raises(UnsupportedModelError) as refusal:
            config_of(**changes)

        assert all(word in str(refusal.value) for word in words)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"hidden_size": ...}, ["config.json", "'hidden_size'"]),
            ({"hidden_size": "2048"}, ["'hidden_size'", "int", "'2048'"]),
            ({"num_hidden_layers": True}, ["'num_hidden_layers'", "True"]),
            ({"architectures": ...}, ["'architectures'"]),
            ({"num_key_value_heads": 5}, ["32 query heads", "5 KV heads"]),
            ({"head_dim": 63}, ["head_dim of 63", "pairs"]),
            ({"num_hidden_layers": 0}, ["num_layers", "at least 1"]),
            ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, ["llama3", "'low_freq_factor'"]),
            ({"rope_scaling": 3}, ["'rope_scaling'", "3"]),
            ({"rope_scaling": {"type": "linear", "factor": 0}}, ["'factor'", "above 0", "'rope_scaling'"]),
            ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, ["'factor'", "finite"]),
            (
                {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2}},
                ["'rope_type'", "'yarn'", "'linear'"],
            ),
            (
                {"rope_scaling": {"type": "llama3", **LLAMA3_SCALING, "low_freq_factor": 4.0}},
                ["low_freq_factor 4.0", "high_freq_factor 4.0"],
            ),
            (
                {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"type": "linear", "factor": 2}},
                ["rope_theta 1000000.0", "lost", "500000.0"],
            ),
            ({"rope_theta": 10**400}, ["'rope_theta'", "finite"]),
            ({"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": -8}}, ["'beta_fast'", "above 0"]),
            ({"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_theta": 1}, ["rope_theta above 1", "1.0"]),
            ({"rope_theta": -1.0}, ["'rope_theta'", "-1.0"]),
            ({"rms_norm_eps": -1e-5}, ["rms_norm_eps"]),
            ({"model_type": "mistral"}, ["'LlamaForCausalLM'", "'mistral'", "must agree"]),
            (
                {
                    "architectures": ["MistralForCausalLM"],
                    "sliding_window": None,
                    "layer_types": ["sliding_attention"] * 16,
                },
                ["'layer_types'", "'sliding_window'"],
            ),
            (
                {
                    "architectures": ["Qwen2ForCausalLM"],
                    "layer_types": ["sliding_attention"] * 16,
                    "sliding_window": 64,
                },
                ["'layer_types'", "'use_sliding_window'"],
            ),
            ({"architectures": ["MistralForCausalLM"], "sliding_window": 0}, ["'sliding_window'", "0"]),
            ({"layer_types": ["full_attention"] * 3}, ["'layer_types'", "16 names"]),
            ({"eos_token_id": "</s>"}, ["'eos_token_id'", "</s>"]),
        ],
    )
    def test_broken(self, changes: dict[str, Any], words: list[str]) -> None:
        with pytest.raises(ConfigurationError) as refusal:
            config_of(**changes)

        assert not isinstance(refusal.value, UnsupportedModelError)
        assert all(word in str(refusal.value) for word in words)


class TestOperationCounts:
    def test_attention_counts_causal_pairs(self) -> None:
        """Three new tokens at the end of five see 3 + 4 + 5 positions."""
        config = config_of(num_hidden_layers=1)

        assert config.attention_flops(num_tokens=3, context_len=5) == 4 * 2048 * 12

    @pytest.mark.parametrize(("num_tokens", "context_len"), [(1, 1), (3, 5), (5, 5), (9, 9), (4, 20), (1, 20)])
    def test_sliding_windows_cut_the_pairs(self, num_tokens: int, context_len: int) -> None:
        config = config_of(architectures=["MistralForCausalLM"], sliding_window=4, num_hidden_layers=1)

        seen = sum(min(position, 4) for position in range(context_len - num_tokens + 1, context_len + 1))

        assert config.attention_flops(num_tokens, context_len) == 4 * 2048 * seen

    def test_only_wanted_rows_pay_for_the_vocabulary(self) -> None:
        config = config_of()

        assert config.linear_flops(10, 10) - config.linear_flops(10, 1) == 2 * 9 * 128_256 * 2048


class TestFamilies:
    def test_gemma_3_1b_says_little_and_means_much(self) -> None:
        """Its ``config.json`` as it was published; what it leaves out are the family's defaults."""
        config = config_from_hf(
            {
                "architectures": ["Gemma3ForCausalLM"],
                "model_type": "gemma3_text",
                "attn_logit_softcapping": None,
                "cache_implementation": "hybrid",
                "final_logit_softcapping": None,
                "head_dim": 256,
                "hidden_activation": "gelu_pytorch_tanh",
                "hidden_size": 1152,
                "intermediate_size": 6912,
                "max_position_embeddings": 32_768,
                "num_attention_heads": 4,
                "num_hidden_layers": 26,
                "num_key_value_heads": 1,
                "query_pre_attn_scalar": 256,
                "rms_norm_eps": 1e-6,
                "rope_local_base_freq": 10_000,
                "rope_scaling": None,
                "rope_theta": 1_000_000,
                "sliding_window": 512,
                "sliding_window_pattern": 6,
                "vocab_size": 262_144,
            }
        )

        assert config.tie_word_embeddings
        assert config.sliding_windows == ((512,) * 5 + (None,)) * 4 + (512, 512)
        assert (config.rope_theta, config.sliding_rope_theta) == (1_000_000.0, 10_000.0)
        assert config.num_parameters == 999_885_952

    def test_longrope_takes_the_long_divisors_where_sequences_may_be_long(self) -> None:
        scaling = {"type": "longrope", "short_factor": [1.0] * 32, "long_factor": [4.0] * 32}
        config = config_of(
            architectures=["Phi3ForCausalLM"], original_max_position_embeddings=4096, rope_scaling=scaling
        )

        for length, divisor in ((4096, 1.0), (4097, 4.0), (None, 4.0)):
            chosen = config.for_length(length).rope_scaling
            assert isinstance(chosen, FactorsRope)
            assert set(chosen.divisors) == {divisor}
            assert chosen.attention_factor == pytest.approx(1.1902380714)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"partial_rotary_factor": 0.01}, ["turns 0", "head_dim of 64"]),
            ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": "x"}}, ["long_factor", "'x'"]),
            ({"rope_scaling": {"type": "longrope", "short_factor": [0], "long_factor": [1]}}, ["short_factor[0]"]),
        ],
    )
    def test_broken_phi(self, changes: dict[str, Any], words: list[str]) -> None:
        with pytest.raises(ConfigurationError) as refusal:
            config_of(architectures=["Phi3ForCausalLM"], **changes)

        assert all(word in str(refusal.value) for word in words)
