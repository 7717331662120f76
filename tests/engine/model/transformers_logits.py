"""One folder through both programs: this decoder, and transformers on the CPU in float32."""

import warnings
from pathlib import Path
from typing import Any

import torch

from disagg.base.config import DType
from disagg.cache.layout import KvFormat
from disagg.engine.kernels.interface import KernelBackend
from disagg.engine.kernels.torch_backend import TorchBackend
from disagg.engine.model.decoder import Decoder
from disagg.engine.model.weights import load_weights
from disagg.models.locate import load_config, locate_model


def load_decoder(
    folder: Path,
    max_model_len: int | None = None,
    backend: KernelBackend | None = None,
    dtype: DType = DType.FLOAT32,
) -> Decoder:
    files = locate_model(str(folder))
    config = load_config(files)
    backend = backend or TorchBackend(KvFormat.INTERLEAVED)
    weights = load_weights(files, config, backend, dtype=dtype)
    return Decoder(config, weights, backend, max_model_len)


def reference_logits(folder: Path, token_ids: list[int]) -> torch.Tensor:
    """Return transformers' logits of every position."""
    with torch.inference_mode():
        logits: torch.Tensor = reference_model(folder)(torch.tensor([token_ids])).logits[0]
    return logits


def reference_model(folder: Path) -> Any:
    """Return transformers' model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
