"""Mixtures of experts against transformers, on tiny random models in float32, on both kernel backends."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from step_runner import StepRunner, greedy
from transformers_logits import load_decoder, reference_logits, reference_model

from disagg.base.config import DType, Quantization
from disagg.base.errors import ConfigurationError
from disagg.cache.layout import KvFormat
from disagg.engine.kernels.interface import KernelBackend, SparseMlp
from disagg.engine.kernels.native_backend import NativeBackend, native_unavailable_reason
from disagg.engine.kernels.torch_backend import TorchBackend
from disagg.engine.model.weights import expected_shapes, load_weights
from disagg.models.locate import load_config, locate_model

EIGHT: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "mixtral-sliding": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 1, "sliding_window": 24}),
    "qwen2-moe": ("qwen2_moe", EIGHT | {"shared_expert_intermediate_size": 48}),
    "qwen2-moe-all": ("qwen2_moe", EIGHT | {"num_experts_per_tok": 8, "shared_expert_intermediate_size": 16}),
    "qwen3-moe": ("qwen3_moe", EIGHT | {"norm_topk_prob": True, "attention_bias": True}),
    "olmoe": ("olmoe", {"num_experts": 8, "num_experts_per_tok": 3}),
    "olmoe-normalised": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}),
    "qwen3-moe-dense-layers": (
        "qwen3_moe",
        EIGHT | {"num_hidden_layers": 4, "mlp_only_layers": [1], "decoder_sparse_step": 2},
    ),
}


@pytest.fixture(params=MODELS, scope="module")
def folder(request: pytest.FixtureRequest, tiny_model: Any) -> Path:
    model_type, settings = MODELS[request.param]
    path: Path = tiny_model(model_type, **settings)
    return path


@pytest.fixture(params=["native", "torch"])
def backend(request: pytest.FixtureRequest) -> KernelBackend:
    if request.param == "torch":
        return TorchBackend(KvFormat.INTERLEAVED)
    if reason := native_unavailable_reason(torch.device("cpu"), torch.float32):
        pytest.skip(reason)
    return NativeBackend()


def test_logits_of_a_prompt_are_those_of_transformers(folder: Path, backend: KernelBackend) -> None:
    token_ids = torch.randint(0, 320, (150,), generator=torch.Generator().manual_seed(1)).tolist()

    logits = StepRunner(load_decoder(folder, backend=backend)).step({0: token_ids}, all_rows=True)

    torch.testing.assert_close(logits, reference_logits(folder, token_ids), atol=1e-4, rtol=1e-4)


def test_greedy_answers_are_those_of_transformers(folder: Path, backend: KernelBackend) -> None:
    """Three sequences share their decode steps, and with them the experts that are read."""
    prompts = [[5, 6, 7], list(range(40, 57)), [200]]
    decoder = load_decoder(folder, backend=backend)

    answers = greedy(decoder, prompts, max_tokens=12)

    model = reference_model(folder)
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
        assert expected[0, len(prompt) :].tolist() == answer


def test_int8_experts_are_close_and_the_router_is_exact(tiny_model: Any, backend: KernelBackend) -> None:
    files = locate_model(str(tiny_model("qwen2_moe", **MODELS["qwen2-moe"][1])))
    config = load_config(files)
    exact, rounded = (
        load_weights(files, config, backend, dtype=DType.FLOAT32, quantization=quantization).layers[0].mlp
        for quantization in (None, Quantization.INT8)
    )
    assert isinstance(exact, SparseMlp)
    assert isinstance(rounded, SparseMlp)
    x = torch.randn(5, 64)
    assert torch.equal(exact.router(x), rounded.router(x))
    for one, other in zip(exact.dense_parts, rounded.dense_parts, strict=True):
        error = (one.gate_up(x) - other.gate_up(x)).abs().max() / one.gate_up(x).abs().max()
        assert 0 < error < 0.02


def test_parameters_are_counted_right(folder: Path) -> None:
    config = load_config(locate_model(str(folder)))
    counted = sum(torch.Size(shape).numel() for shape in expected_shapes(config).values())
    assert config.num_parameters == counted


def test_a_missing_expert_is_named(tiny_model: Any, tmp_path: Path) -> None:
    folder = tiny_model("mixtral", **MODELS["mixtral"][1])
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.7.w2.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())

    with pytest.raises(
        ConfigurationError, match=r"lack tensor 'model\.layers\.1\.block_sparse_moe\.experts\.7\.w2\.weight'"
    ):
        load_decoder(tmp_path)
