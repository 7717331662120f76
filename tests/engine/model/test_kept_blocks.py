"""Weights that stay in the blocks of their GGUF file compute what the dequantised ones compute, in less memory."""

import os
from pathlib import Path
from typing import Any

import numpy.typing as npt
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from gguf_converter import convert
from step_runner import StepRunner, greedy

from disagg.base.clock import MonotonicClock
from disagg.base.config import DType, Quantization
from disagg.base.errors import ConfigurationError
from disagg.cache.layout import KvFormat
from disagg.engine.kernels.interface import DecoderWeights, KernelBackend
from disagg.engine.kernels.native_backend import NativeBackend, native_unavailable_reason
from disagg.engine.kernels.torch_backend import TorchBackend
from disagg.engine.kernels.weight_memory import PRIVATE, WeightMemory
from disagg.engine.model.decoder import Decoder
from disagg.engine.model.shared_weights import load_shared
from disagg.engine.model.weights import load_weights, most_weight_bytes
from disagg.models.locate import load_config, locate_model

Q4_0, Q8_0 = GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q8_0


def quantized(folder: Path, path: Path, mixed: bool) -> Path:
    """A Llama in Q4_0; with ``mixed`` values are Q8_0, as in llama.cpp's mixtures, and cannot join queries and keys."""

    def kind_of(name: str, values: npt.NDArray[Any]) -> GGMLQuantizationType:
        if values.ndim == 1:
            return GGMLQuantizationType.F32
        return Q8_0 if mixed and ".v_proj." in name else Q4_0

    return convert(folder, path, "llama", kind_of=kind_of)


@pytest.fixture(params=["native", "torch"])
def backend(request: pytest.FixtureRequest) -> KernelBackend:
    if request.param == "torch":
        return TorchBackend(KvFormat.INTERLEAVED)
    if reason := native_unavailable_reason(torch.device("cpu"), torch.float32):
        pytest.skip(reason)
    return NativeBackend()


def load(
    path: Path, backend: KernelBackend, quantization: Quantization | None, memory: WeightMemory = PRIVATE
) -> DecoderWeights:
    files = locate_model(str(path))
    return load_weights(
        files, load_config(files), backend, dtype=DType.FLOAT32, quantization=quantization, memory=memory
    )


def logits_of(path: Path, weights: DecoderWeights, backend: KernelBackend) -> torch.Tensor:
    token_ids = torch.randint(0, 320, (40,), generator=torch.Generator().manual_seed(3)).tolist()
    decoder = Decoder(load_config(locate_model(str(path))), weights, backend)
    return StepRunner(decoder).step({0: token_ids}, all_rows=True)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_same_logits(tiny_model: Any, tmp_path: Path, backend: KernelBackend, tied: bool, mixed: bool) -> None:
    path = quantized(tiny_model("llama", tie_word_embeddings=tied), tmp_path / "model.gguf", mixed)
    dequantized, kept = load(path, backend, None), load(path, backend, Quantization.GGUF)

    torch.testing.assert_close(
        logits_of(path, kept, backend), logits_of(path, dequantized, backend), atol=1e-4, rtol=1e-4
    )
    if backend.name == "native":
        assert kept.num_bytes < (0.6 if tied else 0.5) * dequantized.num_bytes


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_experts_keep_their_blocks(tiny_model: Any, tmp_path: Path, backend: KernelBackend, model_type: str) -> None:
    """Greedy answers too are those of the dequantised weights, which transformers' are in ``test_decoder_gguf``."""
    settings = {
        "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
        "qwen2_moe": {"num_experts": 6, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 96},
    }[model_type]
    folder = tiny_model(model_type, num_experts_per_tok=2, **{k: v for k, v in settings.items() if k[-3:] != "tok"})

    def kind_of(name: str, values: npt.NDArray[Any]) -> GGMLQuantizationType:
        is_plain = values.ndim == 1 or name.endswith(("mlp.gate.weight", "block_sparse_moe.gate.weight"))
        return GGMLQuantizationType.F32 if is_plain else Q8_0 if "down" in name else Q4_0

    architecture = {"mixtral": "llama", "qwen2_moe": "qwen2moe"}[model_type]
    path = convert(folder, tmp_path / "model.gguf", architecture, kind_of=kind_of)
    dequantized, kept = load(path, backend, None), load(path, backend, Quantization.GGUF)

    torch.testing.assert_close(
        logits_of(path, kept, backend), logits_of(path, dequantized, backend), atol=1e-4, rtol=1e-4
    )
    config = load_config(locate_model(str(path)))
    answers = [greedy(Decoder(config, weights, backend), [[5, 6, 7]], max_tokens=12) for weights in (kept, dequantized)]
    assert answers[0] == answers[1]
    if backend.name == "native":
        assert kept.num_bytes < 0.5 * dequantized.num_bytes


def test_instances_share_them(tiny_model: Any, tmp_path: Path, backend: KernelBackend) -> None:
    path = quantized(tiny_model("llama"), tmp_path / "model.gguf", mixed=True)
    most = most_weight_bytes(load_config(locate_model(str(path))))
    descriptor = os.memfd_create("weights-of-a-test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        shared = [
            load_shared(
                f"/proc/{os.getpid()}/fd/{descriptor}",
                "a model",
                most,
                lambda memory: load(path, backend, Quantization.GGUF, memory),
                MonotonicClock(),
            )
            for _ in range(2)
        ]
    finally:
        os.close(descriptor)
    alone = logits_of(path, load(path, backend, Quantization.GGUF), backend)
    for weights in shared:
        assert torch.equal(logits_of(path, weights, backend), alone)


def test_a_folder_has_no_blocks(tiny_model: Any) -> None:
    with pytest.raises(
        ConfigurationError, match=r"--quantization gguf keeps the blocks of a GGUF file, and .* is none"
    ):
        load(tiny_model("llama"), TorchBackend(KvFormat.INTERLEAVED), Quantization.GGUF)
