"""One copy of the packed weights for all instances of a host: whoever comes first packs, all compute the same."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from disagg.base.clock import MonotonicClock
from disagg.base.config import DType, Quantization
from disagg.cache.layout import KvFormat
from disagg.engine.kernels.interface import DecoderWeights, KernelBackend, SparseMlp
from disagg.engine.kernels.native_backend import NativeBackend, native_unavailable_reason
from disagg.engine.kernels.torch_backend import TorchBackend
from disagg.engine.kernels.weight_memory import WeightMemory
from disagg.engine.model.shared_weights import load_shared
from disagg.engine.model.weights import TORCH_DTYPES, load_weights, most_weight_bytes
from disagg.models.locate import ModelFiles, load_config, locate_model

MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {},  # with biases
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}
BACKENDS = {"torch": lambda: TorchBackend(KvFormat.INTERLEAVED), "native": NativeBackend}


@contextmanager
def weights_file() -> Iterator[str]:
    descriptor = os.memfd_create("weights-of-a-test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        yield f"/proc/{os.getpid()}/fd/{descriptor}"
    finally:
        os.close(descriptor)


class Loading:
    """Loads one model, and counts the tensors that were read for it."""

    def __init__(self, files: ModelFiles, backend: KernelBackend, **options: Any) -> None:
        self.config = load_config(files)
        self.num_read = 0
        self._load = partial(load_weights, files, self.config, backend, progress=self._count, **options)

    def _count(self, _: float) -> None:
        self.num_read += 1

    def __call__(self, memory: WeightMemory) -> DecoderWeights:
        return self._load(memory=memory)

    def shared(self, path: str, key: str = "a model") -> DecoderWeights:
        return load_shared(path, key, most_weight_bytes(self.config), self, MonotonicClock())


def make(name: str, model: Path, **options: Any) -> Loading:
    dtype = options.pop("dtype", DType.FLOAT32)
    if name == "native" and (reason := native_unavailable_reason(torch.device("cpu"), TORCH_DTYPES[dtype])):
        pytest.skip(reason)
    return Loading(locate_model(str(model)), BACKENDS[name](), dtype=dtype, **options)


def outputs(weights: DecoderWeights) -> list[torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(3, weights.embeddings.shape[1]).to(weights.embeddings.dtype)
    layer = weights.layers[-1]
    mlp = layer.mlp.dense_parts[-1] if isinstance(layer.mlp, SparseMlp) else layer.mlp
    kept = [weights.embeddings, weights.norm, layer.attention_norm, layer.mlp_norm]
    return [*kept, layer.qkv(hidden), mlp.gate_up(hidden), weights.head(hidden)]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("quantization", [None, Quantization.INT8])
@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("model_type", MODELS)
def test_both_compute_what_weights_of_their_own_would(
    name: str, quantization: Quantization | None, dtype: DType, model_type: str, tiny_model: Any
) -> None:
    model = tiny_model(model_type, **MODELS[model_type])
    options = {"quantization": quantization, "dtype": dtype}
    expected = outputs(make(name, model, **options)._load())
    first, second = make(name, model, **options), make(name, model, **options)
    with weights_file() as path:
        weights = [first.shared(path), second.shared(path)]
        assert first.num_read > 0
        assert second.num_read == 0
    for got in map(outputs, weights):  # the file is closed, and its memory is still there
        for one, other in zip(got, expected, strict=True):
            assert torch.equal(one, other)


def test_nobody_can_change_what_is_shared(tiny_model: Any) -> None:
    loading = make("torch", tiny_model("llama"))
    with weights_file() as path:
        loading.shared(path)
        with open(path, "r+b", buffering=0) as file, pytest.raises(PermissionError):
            file.write(b"x")


def test_half_packed_weights_are_packed_anew(tiny_model: Any) -> None:
    loading = make("torch", tiny_model("llama"))

    def die(memory: WeightMemory) -> DecoderWeights:
        loading(memory)
        raise KeyboardInterrupt

    with weights_file() as path:
        with pytest.raises(KeyboardInterrupt):
            load_shared(path, "a model", most_weight_bytes(loading.config), die, MonotonicClock())
        again = make("torch", tiny_model("llama"))
        weights = again.shared(path)
        assert again.num_read > 0
        for one, other in zip(outputs(weights), outputs(loading._load()), strict=True):
            assert torch.equal(one, other)


def test_weights_of_another_model_are_left_alone(tiny_model: Any, caplog: pytest.LogCaptureFixture) -> None:
    first, second = make("torch", tiny_model("llama")), make("torch", tiny_model("qwen2"))
    with weights_file() as path:
        first.shared(path)
        second.shared(path, key="another model")
        assert second.num_read > 0
    assert "the shared weights are not those of another model" in caplog.text


def test_an_instance_goes_on_alone_where_there_is_no_file_or_somebody_packs_for_ever(
    tiny_model: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("disagg.engine.model.shared_weights._LOCK_S", 0.05)
    with weights_file() as path:
        with open(path, "rb") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            make("torch", tiny_model("llama")).shared(path)
        assert "another instance packs them for more than 0.05 s" in caplog.text
    make("torch", tiny_model("llama")).shared("/no/such/file")
    assert "No such file" in caplog.text
