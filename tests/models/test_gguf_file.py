"""GGUF: the header, the tensors, the configuration, and files that are not what they should be."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_writing import LLAMA_METADATA, write_gguf
from test_hf_config import LLAMA

from disagg.base.errors import ConfigurationError, UnsupportedModelError
from disagg.models.config import Architecture, FactorsRope, LinearRope, YarnRope
from disagg.models.gguf_config import config_from_gguf
from disagg.models.gguf_file import GgufFile, hf_tensor_name, undo_rope_permutation
from disagg.models.hf_config import config_from_hf
from disagg.models.locate import ModelFiles

RANDOM = np.random.default_rng(0)
MATRIX = RANDOM.standard_normal((48, 64)).astype(np.float32)


def test_metadata_of_every_type_is_read(tmp_path: Path) -> None:
    metadata = {"a": 7, "b": -0.5, "c": True, "d": "wörd", "e": ["x", "", "ÿ"], "f": [1, 2, 3]}

    with GgufFile(write_gguf(tmp_path / "m.gguf", "llama", metadata, {"w": MATRIX})) as file:
        read = file.metadata

    assert {name: read[name] for name in "abcde"} == {name: metadata[name] for name in "abcde"}
    assert np.asarray(read["f"]).tolist() == [1, 2, 3]


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_tensors_are_those_of_the_reference_dequantisation(tmp_path: Path, name: str) -> None:
    quantization = gguf.GGMLQuantizationType[name]
    path = write_gguf(tmp_path / "m.gguf", "llama", {}, {"w": MATRIX}, quantization)

    with GgufFile(path) as file:
        values = file.read("w")

    expected = gguf.quants.dequantize(gguf.quants.quantize(MATRIX, quantization), quantization)
    np.testing.assert_array_equal(values, expected)
    assert values.dtype == np.float32
    assert values.flags.owndata or values.base.flags.owndata


def test_the_default_model_is_read_as_by_the_reference_reader(default_model: ModelFiles) -> None:
    """Header fields and one tensor of each block format, against ``gguf``'s own (slow) reader."""
    reference = gguf.GGUFReader(default_model.path)
    formats: dict[Any, Any] = {tensor.tensor_type: tensor for tensor in reference.tensors}
    with GgufFile(default_model.path) as file:
        for tensor in formats.values():
            np.testing.assert_array_equal(
                file.read(tensor.name), gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            )
        assert set(file.tensors) == {tensor.name for tensor in reference.tensors}
        tokens = file.metadata["tokenizer.ggml.tokens"]
        assert tokens == reference.fields["tokenizer.ggml.tokens"].contents()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output.weight", "lm_head.weight"),
        ("blk.12.attn_q.bias", "model.layers.12.self_attn.q_proj.bias"),
        ("blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj.weight"),
        ("rope_freqs.weight", None),
    ],
)
def test_names(name: str, expected: str | None) -> None:
    assert hf_tensor_name(name, config_from_hf(LLAMA)) == expected


def test_undoing_the_permutation_of_query_rows() -> None:
    """The converter's own: the two halves of each head, interleaved."""
    num_heads = 4
    permuted = MATRIX.reshape(num_heads, 2, 6, 64).swapaxes(1, 2).reshape(MATRIX.shape)

    np.testing.assert_array_equal(undo_rope_permutation(permuted, num_heads), MATRIX)


class TestDamage:
    def test_another_file(self, tmp_path: Path) -> None:
        path = tmp_path / "m.gguf"
        path.write_bytes(b"PK\x03\x04 something else")

        with pytest.raises(ConfigurationError, match="not a GGUF file"):
            GgufFile(path)

    def test_every_place_to_be_cut(self, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "m.gguf", "llama", LLAMA_METADATA | {"t": ["a", "bc"]}, {"w": MATRIX})
        whole = path.read_bytes()
        for length in range(5, len(whole), 97):
            path.write_bytes(whole[:length])
            with pytest.raises(ConfigurationError, match=r"cut short|damaged"):
                GgufFile(path)

    def test_an_empty_file(self, tmp_path: Path) -> None:
        path = tmp_path / "m.gguf"
        path.touch()

        with pytest.raises(ConfigurationError, match="not a GGUF file"):
            GgufFile(path)

    def test_another_version(self, tmp_path: Path) -> None:
        path = tmp_path / "m.gguf"
        path.write_bytes(b"GGUF" + (9).to_bytes(4, "little") + bytes(64))

        with pytest.raises(ConfigurationError, match="version 9"):
            GgufFile(path)

    def test_a_length_beyond_all_bounds(self, tmp_path: Path) -> None:
        path = tmp_path / "m.gguf"
        path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 64)

        with pytest.raises(ConfigurationError):
            GgufFile(path)


def test_a_block_format_that_nobody_dequantises_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("w", np.zeros((2, 4), np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    with pytest.raises(UnsupportedModelError, match="'w' is stored as I32"), GgufFile(tmp_path / "m.gguf") as file:
        file.read("w")


YARN = {
    "rope__scaling__type": "yarn",
    "rope__scaling__factor": 4.0,
    "rope__scaling__original_context_length": 128,
}


class TestConfiguration:
    def config(self, tmp_path: Path, architecture: str = "llama", **changes: Any) -> Any:
        metadata = {key.replace("llama", architecture, 1): value for key, value in LLAMA_METADATA.items()}
        metadata |= {f"{architecture}.{key.replace('__', '.')}": value for key, value in changes.items()}
        with GgufFile(write_gguf(tmp_path / "m.gguf", architecture, metadata, {"w": MATRIX})) as file:
            return config_from_gguf(file)

    def test_llama(self, tmp_path: Path) -> None:
        config = self.config(tmp_path)

        assert config.architecture is Architecture.LLAMA
        assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 16)
        assert config.tie_word_embeddings

    def test_linear_rope(self, tmp_path: Path) -> None:
        config = self.config(tmp_path, rope__scaling__type="linear", rope__scaling__factor=4.0)

        assert config.rope_scaling == LinearRope(factor=4.0)

    def test_llama_3_1_scaling_is_a_tensor(self, tmp_path: Path) -> None:
        factors = np.array([1.0, 1.0, 2.0, 8.0, 8.0, 8.0, 8.0, 8.0], np.float32)
        path = write_gguf(tmp_path / "m.gguf", "llama", LLAMA_METADATA, {"w": MATRIX, "rope_freqs.weight": factors})
        with GgufFile(path) as file:
            config = config_from_gguf(file)

        assert config.rope_scaling == FactorsRope(divisors=tuple(factors.tolist()))

    def test_yarns_own_bounds(self, tmp_path: Path) -> None:
        bounds = {"rope__scaling__yarn_beta_fast": 8.0, "rope__scaling__yarn_beta_slow": 2.0}
        neutral = {"rope__scaling__attn_factor": 1.0, "rope__scaling__yarn_ext_factor": -1.0, "logit_scale": 0.0}

        scaling = self.config(tmp_path, "qwen2", **YARN, **bounds, **neutral).rope_scaling

        assert scaling == YarnRope(
            factor=4.0,
            original_max_position_embeddings=128,
            attention_factor=pytest.approx(1.1386294),
            beta_fast=8.0,
            beta_slow=2.0,
        )

    @pytest.mark.parametrize("key", ["rope__scaling__factor", "rope__scale_linear"])
    def test_a_factor_without_a_type_is_linear(self, tmp_path: Path, key: str) -> None:
        assert self.config(tmp_path, **{key: 4.0}).rope_scaling == LinearRope(factor=4.0)
        assert self.config(tmp_path, **{key: 4.0, "rope__scaling__type": "none"}).rope_scaling is None

    def test_a_scaling_beside_the_tensor_is_refused(self, tmp_path: Path) -> None:
        metadata = LLAMA_METADATA | {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
        factors = np.ones(8, np.float32)
        path = write_gguf(tmp_path / "m.gguf", "llama", metadata, {"rope_freqs.weight": factors})

        with GgufFile(path) as file, pytest.raises(UnsupportedModelError, match=r"'linear'.*rope_freqs\.weight"):
            config_from_gguf(file)

    @pytest.mark.parametrize("factors", [np.ones(7, np.float32), np.zeros(8, np.float32)])
    def test_a_scaling_tensor_that_does_not_fit_is_named(self, tmp_path: Path, factors: Any) -> None:
        path = write_gguf(tmp_path / "m.gguf", "llama", LLAMA_METADATA, {"rope_freqs.weight": factors})

        with GgufFile(path) as file, pytest.raises(ConfigurationError, match=r"rope_freqs\.weight.*8 numbers above 0"):
            config_from_gguf(file)

    def test_a_key_that_nothing_knows_is_named_in_a_warning(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        self.config(tmp_path, novel_gain=3.0)

        assert "'llama.novel_gain'" in caplog.text
        assert "embedding_length" not in caplog.text

    def test_part_of_a_split_model_is_refused(self, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "m.gguf", "llama", LLAMA_METADATA | {"split.count": 3}, {"w": MATRIX})

        with GgufFile(path) as file, pytest.raises(UnsupportedModelError, match=r"split\.count = 3.*one file"):
            config_from_gguf(file)

    @pytest.mark.parametrize(
        ("architecture", "changes", "words"),
        [
            ("gemma4", {}, ["'gemma3'", "general.architecture", "'qwen2'"]),
            ("qwen2", {"expert_count": 8}, ["qwen2.expert_count", "8", "dense"]),
            ("llama", {"expert_count": 8, "expert_gating_func": 2}, ["llama.expert_gating_func", "2", "softmax"]),
            ("qwen2", {"rope__scaling__type": "longrope"}, ["qwen2.rope.scaling.type", "'longrope'", "'yarn'"]),
            ("llama", {"attention__sliding_window": 4096}, ["sliding_window", "4096", "Hugging Face folder"]),
            ("llama", {"rope__dimension_count": 8}, ["rope.dimension_count", "8", "16"]),
            ("llama", {"attention__value_length": 8}, ["attention.value_length", "8", "16"]),
            ("qwen2", YARN | {"rope__scaling__attn_factor": 0.7}, ["qwen2.rope.scaling.attn_factor", "0.69"]),
            ("qwen3", YARN | {"rope__scaling__yarn_log_multiplier": 0.1}, ["yarn_log_multiplier", "0.1", "folder"]),
            ("llama", YARN | {"rope__scaling__yarn_ext_factor": 0.5}, ["yarn_ext_factor", "0.5"]),
            ("llama", YARN | {"rope__scaling__yarn_attn_factor": 2.0}, ["yarn_attn_factor", "2.0"]),
            ("llama", {"final_logit_softcapping": 30.0}, ["llama.final_logit_softcapping", "30.0"]),
            ("llama", {"logit_scale": 8.0}, ["llama.logit_scale", "8.0"]),
            ("llama", {"attention__causal": False}, ["llama.attention.causal", "False"]),
        ],
    )
    def test_refusals(self, tmp_path: Path, architecture: str, changes: dict[str, Any], words: list[str]) -> None:
        with pytest.raises(UnsupportedModelError) as refusal:
            self.config(tmp_path, architecture, **changes)

        assert all(word in str(refusal.value) for word in words)

    def test_a_missing_key_is_named(self, tmp_path: Path) -> None:
        metadata = {key: value for key, value in LLAMA_METADATA.items() if key != "llama.block_count"}

        with GgufFile(write_gguf(tmp_path / "m.gguf", "llama", metadata, {"w": MATRIX})) as file:
            with pytest.raises(ConfigurationError, match=r"llama\.block_count"):
                config_from_gguf(file)
