"""Shapes for predictions: their sizes against transformers' own, and OPT, which is predicted and never computed."""

import csv
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from disagg.base.errors import ConfigurationError, UnsupportedModelError
from disagg.base.window_blocks import WindowBlocks
from disagg.costs.devices import find_device
from disagg.costs.published import PUBLISHED_MODELS, PublishedPlatform
from disagg.costs.roofline import RooflinePlatform
from disagg.models.hf_config import config_from_hf
from disagg.models.known_shapes import KNOWN_SHAPES, known_shape, shape_from_hf

OPT_13B: dict[str, Any] = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "activation_function": "relu",
    "do_layer_norm_before": True,
    "ffn_dim": 20_480,
    "hidden_size": 5120,
    "max_position_embeddings": 2048,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "vocab_size": 50_272,
    "word_embed_proj_dim": 5120,
}


def test_a_config_file_gives_the_known_shape() -> None:
    assert shape_from_hf(OPT_13B, "config.json") == KNOWN_SHAPES["opt-13b"] == known_shape("facebook/OPT-13b")
    assert known_shape("opt-14b") is None


@pytest.mark.parametrize(
    "name", ["opt-13b", "llama-2-7b", "llama-3-70b", "mixtral-8x7b", "qwen3-30b-a3b", "gemma-3-1b"]
)
def test_parameters_are_counted_as_transformers_does(name: str) -> None:
    import torch
    from transformers import (
        AutoModelForCausalLM,
        Gemma3TextConfig,
        LlamaConfig,
        MixtralConfig,
        OPTConfig,
        Qwen3MoeConfig,
    )

    shape = KNOWN_SHAPES[name]
    sizes = {"num_hidden_layers": shape.num_layers, "num_attention_heads": shape.num_heads}
    sizes |= {"hidden_size": shape.hidden_size, "vocab_size": shape.vocab_size}
    config: Any
    if name.startswith("opt"):
        config = OPTConfig(ffn_dim=shape.intermediate_size, word_embed_proj_dim=shape.hidden_size, **sizes)
    elif name.startswith("mixtral"):
        config = MixtralConfig(num_key_value_heads=shape.num_kv_heads, **sizes)
    elif name.startswith("qwen3"):
        config = Qwen3MoeConfig(num_key_value_heads=shape.num_kv_heads, head_dim=shape.head_dim, **sizes)
    elif name.startswith("gemma"):
        kv = {"num_key_value_heads": shape.num_kv_heads, "head_dim": shape.head_dim}
        config = Gemma3TextConfig(**sizes, **kv, intermediate_size=shape.intermediate_size)
    else:
        kv = {"num_key_value_heads": shape.num_kv_heads, "intermediate_size": shape.intermediate_size}
        config = LlamaConfig(**sizes, **kv)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model.num_parameters() == shape.num_parameters


def test_more_tokens_read_more_experts() -> None:
    shape = KNOWN_SHAPES["qwen3-30b-a3b"]
    read = [shape.num_read_parameters(num_tokens) for num_tokens in (1, 2, 16, 512)]
    assert read[0] == shape.num_active_parameters == pytest.approx(3.04e9, rel=0.01)
    assert sorted(set(read)) == read
    assert read[-1] == pytest.approx(shape.num_linear_parameters)


def test_what_opt_leaves_open_is_as_in_the_released_models() -> None:
    for change in ({"do_layer_norm_before": False}, {"word_embed_proj_dim": 512}, {"activation_function": "gelu"}):
        with pytest.raises(UnsupportedModelError, match=f"{next(iter(change))} = .* is not predicted; only"):
            shape_from_hf({**OPT_13B, **change}, "config.json")
    with pytest.raises(ConfigurationError, match="num_heads must be at least 1, got 0"):
        shape_from_hf({**OPT_13B, "num_attention_heads": 0}, "config.json")


def test_opt_is_not_served() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'OPTForCausalLM' .*is not supported; supported: Llama"):
        config_from_hf(OPT_13B)


def test_capacities_are_those_that_distserve_measured(reference_data: Path) -> None:
    """DistServe's worker profiles what a forward pass needs; a data sheet takes 1% of the memory."""
    with (reference_data / "distserve" / "max_num_tokens.csv").open(encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            name = row["model"].removeprefix("facebook/")
            tensor, pipeline = int(row["tp"]), int(row["pp"])
            platform = RooflinePlatform(KNOWN_SHAPES[name], find_device("a100-sxm"), name)
            assert platform.capacity_tokens(tensor, pipeline) == pytest.approx(int(row["max_num_tokens"]), rel=0.1)
    for model in PUBLISHED_MODELS:
        shape = KNOWN_SHAPES[model.removeprefix("facebook/")]
        assert PublishedPlatform("distserve", model).kv_bytes_per_token == shape.kv_bytes_per_token(itemsize=2)


def test_gemma_keeps_of_a_long_sequence_what_its_windows_see() -> None:
    """12B: 8 layers of 48 see all. Of 512 blocks of 32k tokens the last 1,024 are in 17: five more for each of them."""
    shape = KNOWN_SHAPES["gemma-3-12b"]
    assert (shape.block_layers, shape.window_blocks) == (8, WindowBlocks(1024, 5))
    block_bytes = 64 * 2 * 8 * 8 * 256 * 2
    assert shape.kv_bytes(32_768, 2) == (512 + 5 * 16) * block_bytes
    assert shape.kv_bytes(32_769, 2) == (513 + 5 * 17) * block_bytes
    assert shape.kv_bytes(1000, 2) == 6 * 16 * block_bytes
    dense = KNOWN_SHAPES["llama-3-8b"]
    assert dense.kv_bytes(6400, 2) == 6400 * dense.kv_bytes_per_token(2)


@pytest.mark.parametrize(
    ("windows", "block_layers", "num_each"),
    [
        ((None, 64) * 6, 6, 1),
        ((64,) * 32, 4, 7),
        ((None,) + (64,) * 31, 4, 7),
        ((None,) * 11 + (64,), 12, 0),
        ((None, None, 64) * 4, 8, 1),
        ((10**6,) * 4, 4, 0),
    ],
    ids=["Gemma 2", "Mistral", "one sees all", "one slides", "a third slides", "none is outgrown"],
)
def test_layers_are_shared_out_among_blocks(windows: tuple[int | None, ...], block_layers: int, num_each: int) -> None:
    shape = structs.replace(KNOWN_SHAPES["llama-3-8b"], num_layers=len(windows), sliding_windows=windows)
    assert shape.block_layers == block_layers
    assert shape.window_blocks == (WindowBlocks(64, num_each) if num_each else None)
    assert sorted(shape.pool_layers) == list(range(len(windows)))
    kept = [window for window, place in zip(windows, shape.pool_layers, strict=True) if place < block_layers]
    assert None not in windows or kept.count(None) == windows.count(None)
