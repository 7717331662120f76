"""Loading: what must be in the files, and what is said when it is not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from step_runner import StepRunner
from transformers_logits import load_decoder, reference_logits

from disagg.base.config import DType, Quantization
from disagg.base.errors import ConfigurationError
from disagg.cache.layout import KvFormat
from disagg.engine.kernels.interface import DecoderWeights
from disagg.engine.kernels.torch_backend import TorchBackend
from disagg.engine.model.weights import expected_shapes, load_weights
from disagg.models.locate import load_config, locate_model


def load(folder: Path, dtype: DType = DType.FLOAT32, **options: Any) -> DecoderWeights:
    files = locate_model(str(folder))
    return load_weights(files, load_config(files), TorchBackend(KvFormat.INTERLEAVED), dtype=dtype, **options)


@pytest.fixture
def folder(tiny_model: Any, tmp_path: Path) -> Path:
    """A model whose files may be spoilt."""
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    stored = load_file(path) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in stored.items() if tensor is not None}, path)


def test_progress_rises_to_one(folder: Path) -> None:
    fractions: list[float] = []

    load(folder, progress=fractions.append)

    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0


def test_weights_are_cast(folder: Path) -> None:
    weights = load(folder, DType.BFLOAT16)

    assert weights.embeddings.dtype is torch.bfloat16
    assert weights.layers[0].mlp.gate_up(torch.ones(1, 64, dtype=torch.bfloat16)).shape == (1, 192)


def test_matrices_may_be_stored_as_int8(folder: Path) -> None:
    plain, quantized = load(folder), load(folder, quantization=Quantization.INT8)
    for exact, rounded in ((plain.layers[0].mlp.down, quantized.layers[0].mlp.down), (plain.head, quantized.head)):
        width = 96 if exact is plain.layers[0].mlp.down else 64
        y = torch.randn(3, width)
        error = (exact(y) - rounded(y)).abs().max() / exact(y).abs().max()
        assert 0 < error < 0.02
    assert torch.equal(plain.embeddings, quantized.embeddings)


def test_the_files_may_go_away_after_loading(folder: Path) -> None:
    weights = load(folder)
    before = weights.embeddings.clone()
    path = folder / "model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))

    assert torch.equal(weights.embeddings, before)


def test_parameters_are_counted_right(tiny_model: Any) -> None:
    for model_type, settings in (("llama", {"attention_bias": True, "mlp_bias": True}), ("qwen2", {}), ("qwen3", {})):
        config = load_config(locate_model(str(tiny_model(model_type, **settings))))
        counted = sum(torch.Size(shape).numel() for shape in expected_shapes(config).values())
        assert config.num_parameters == counted


def test_a_tied_head_in_the_file_changes_nothing(tiny_model: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("llama", tie_word_embeddings=True), tmp_path / "model"))
    change(folder, lm_head__weight=load_file(folder / "model.safetensors")["model.embed_tokens.weight"].clone())

    weights = load(folder)

    assert torch.equal(weights.head(torch.eye(64)), weights.embeddings.T)


def test_a_head_of_its_own_is_used_though_the_config_ties_it(
    tiny_model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As transformers 5 does."""
    folder = Path(shutil.copytree(tiny_model("llama", tie_word_embeddings=True), tmp_path / "model"))
    change(folder, lm_head__weight=torch.randn(320, 64))
    token_ids = list(range(40))

    logits = StepRunner(load_decoder(folder)).step({0: token_ids}, all_rows=True)

    torch.testing.assert_close(logits, reference_logits(folder, token_ids), atol=1e-4, rtol=1e-4)
    assert "tie_word_embeddings is true" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_element_type_of_floats_is_read(folder: Path, dtype: torch.dtype) -> None:
    norm = torch.rand(64).to(dtype)
    change(folder, model__norm__weight=norm)

    assert torch.equal(load(folder).norm, norm.float())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.float8_e4m3fn])
def test_quantised_tensors_are_never_taken_for_weights(folder: Path, dtype: torch.dtype) -> None:
    change(folder, model__norm__weight=torch.ones(64).to(dtype))

    with pytest.raises(ConfigurationError, match=r"'model\.norm\.weight' is stored as .*F32"):
        load(folder)


class TestIndex:
    """``model.safetensors.index.json`` decides where a tensor is read."""

    @pytest.fixture
    def folder(self, tiny_model: Any, tmp_path: Path) -> Path:
        return Path(shutil.copytree(tiny_model("llama", max_shard_size="100KB"), tmp_path / "model"))

    def test_a_tensor_in_two_shards_comes_from_the_one_that_is_named(self, folder: Path) -> None:
        shards = sorted(folder.glob("*.safetensors"))
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        other = next(path for path in shards if path.name != index["model.norm.weight"])
        expected = load(folder).norm
        save_file(load_file(other) | {"model.norm.weight": torch.zeros(64)}, other)

        assert torch.equal(load(folder).norm, expected)

    def test_a_tensor_that_is_not_where_the_index_says_is_named(self, folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        wrong = next(n for n in index["weight_map"].values() if n != index["weight_map"]["model.norm.weight"])
        index["weight_map"]["model.norm.weight"] = wrong
        path.write_text(json.dumps(index))

        with pytest.raises(ConfigurationError, match=r"'model\.norm\.weight' into .*, which lacks it"):
            load(folder)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    change(folder, model__layers__1__mlp__up_proj__weight=None)

    with pytest.raises(ConfigurationError, match=r"lack tensor 'model\.layers\.1\.mlp\.up_proj\.weight' \[96, 64\]"):
        load(folder)


def test_a_surplus_tensor_is_named(folder: Path) -> None:
    change(folder, model__layers__0__self_attn__q_proj__bias=torch.zeros(64))

    with pytest.raises(ConfigurationError, match=r"'model\.layers\.0\.self_attn\.q_proj\.bias'.*does not use"):
        load(folder)


def test_a_tensor_of_another_shape_is_named(folder: Path) -> None:
    change(folder, model__norm__weight=torch.zeros(65))

    with pytest.raises(ConfigurationError, match=r"'model\.norm\.weight' is \[65\].*\[64\]"):
        load(folder)


def test_a_file_cut_short_is_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])

    with pytest.raises(ConfigurationError, match=r"model\.safetensors.*download it again"):
        load(folder)
