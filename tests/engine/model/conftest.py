"""The default model as transformers computes it: loaded once, since that takes ten seconds."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from disagg.base.config import DType
from disagg.engine.kernels.select import select_backend
from disagg.engine.model.decoder import Decoder
from disagg.engine.model.weights import load_weights
from disagg.models.locate import ModelFiles, load_config


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine cost more than they bring to models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def reference_model(default_model: ModelFiles) -> Iterator[Any]:
    """transformers' model of the default GGUF file, dequantised to float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoModelForCausalLM, GgufConfig

        yield AutoModelForCausalLM.from_pretrained(
            default_model.path.parent,
            gguf_file=default_model.path.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        ).eval()


@pytest.fixture(scope="session")
def default_decoder(default_model: ModelFiles) -> Decoder:
    """The default model in float32, on the kernels that a user of this machine gets."""
    config = load_config(default_model)
    backend = select_backend(torch.device("cpu"), torch.float32)
    return Decoder(config, load_weights(default_model, config, backend, dtype=DType.FLOAT32), backend, 4096)
