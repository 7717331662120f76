"""On a CUDA device: the CPU's logits, and the very same tokens from the same logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from step_runner import StepRunner

from disagg.base.config import DType
from disagg.base.sampling import SamplingParams
from disagg.engine.kernels.select import select_backend
from disagg.engine.model.adjustments import SamplingRow
from disagg.engine.model.decoder import Decoder
from disagg.engine.model.sampler import chooser_of, sample
from disagg.engine.model.weights import load_weights
from disagg.models.locate import load_config, locate_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def logits_on(device: str, folder: Path, token_ids: list[int]) -> torch.Tensor:
    files = locate_model(str(folder))
    config = load_config(files)
    backend = select_backend(torch.device(device), torch.float32)
    weights = load_weights(files, config, backend, dtype=DType.FLOAT32, device=device)
    return StepRunner(Decoder(config, weights, backend)).step({0: token_ids}, all_rows=True).cpu()


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_logits_are_those_of_the_cpu(tiny_model: Any, model_type: str) -> None:
    token_ids = torch.randint(0, 320, (150,), generator=torch.Generator().manual_seed(1)).tolist()
    folder = tiny_model(model_type)

    torch.testing.assert_close(
        logits_on("cuda", folder, token_ids), logits_on("cpu", folder, token_ids), atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize("params", [{}, {"top_p": 0.9}, {"top_k": 20, "temperature": 0.7}, {"frequency_penalty": 0.5}])
def test_sampled_tokens_are_those_of_the_cpu(params: dict[str, Any]) -> None:
    logits = torch.randn(256, 5000, generator=torch.Generator().manual_seed(2)) * 3
    rows = [
        SamplingRow(SamplingParams(max_tokens=9, seed=seed, logprobs=2, **params), [1, 2], [3, 3])
        for seed in range(256)
    ]

    def tokens_on(device: str) -> list[int]:
        chooser = chooser_of(select_backend(torch.device(device), torch.float32))
        return [token.token_id for token in sample(logits.clone().to(device), rows, chooser)]

    assert tokens_on("cuda") == tokens_on("cpu")
