"""Fields of ``config.json``, one by one: what is computed equals transformers, what is not computed is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from step_runner import StepRunner
from transformers_logits import load_decoder, reference_logits

LINEAR = {"rope_type": "linear", "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
THETA = {"rope_type": "default", "rope_theta": 500_000.0}
ALTERNATING = ["full_attention", "sliding_attention"]

COMPUTED: dict[str, tuple[str, dict[str, Any]]] = {
    "rope_theta alone": ("llama", {"rope_parameters": ..., "rope_theta": 500_000.0}),
    "no rope at all": ("llama", {"rope_parameters": ...}),
    "rope_scaling beside rope_parameters": ("llama", {"rope_scaling": LINEAR}),
    "rope_scaling with its own theta": (
        "llama",
        {"rope_parameters": ..., "rope_scaling": LINEAR | {"rope_theta": 5e5}},
    ),
    "rope_scaling with theta beside it": ("llama", {"rope_parameters": ..., "rope_scaling": LINEAR, "rope_theta": 5e5}),
    "empty rope_scaling": ("llama", {"rope_parameters": THETA, "rope_scaling": {}}),
    "null rope_scaling": ("llama", {"rope_parameters": THETA, "rope_scaling": None}),
    "type for rope_type": ("llama", {"rope_scaling": {"type": "linear", "factor": 2}}),
    "dynamic": ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    "default": ("llama", {"rope_scaling": {"rope_type": "default"}}),
    "llama3": ("llama", {"rope_scaling": LLAMA3}),
    "llama3, length from the limit": (
        "llama",
        {"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"}},
    ),
    "yarn": ("mistral", {"rope_scaling": YARN, "sliding_window": None}),
    "yarn, length beside the section": (
        "llama",
        {"rope_scaling": YARN, "original_max_position_embeddings": 32},
    ),
    "yarn, finetuned": ("llama", {"rope_scaling": YARN | {"finetuned": True}}),
    "yarn, attention_factor": ("llama", {"rope_scaling": YARN | {"attention_factor": 1.7}}),
    "yarn, betas": ("llama", {"rope_scaling": YARN | {"beta_fast": 8, "beta_slow": 2}}),
    "yarn, betas of zero": ("llama", {"rope_scaling": YARN | {"beta_fast": 0, "beta_slow": 0}}),
    "yarn, mscales": ("llama", {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}}),
    "yarn, one mscale": ("llama", {"rope_scaling": YARN | {"mscale": 0.7}}),
    "yarn, not truncated": ("qwen3", {"rope_scaling": YARN | {"truncate": False}}),
    "rms_norm_eps": ("llama", {"rms_norm_eps": 0.1}),
    "swish": ("llama", {"hidden_act": "swish"}),
    "pretraining_tp": ("llama", {"pretraining_tp": 2}),
    "attention_dropout": ("llama", {"attention_dropout": 0.5}),
    "qwen2's attention_bias": ("qwen2", {"attention_bias": True}),
    "mistral, window not said": ("mistral", {"sliding_window": ...}),
    "mistral, layer types": ("mistral", {"sliding_window": 24, "layer_types": ALTERNATING}),
    "mistral, no layer slides": ("mistral", {"sliding_window": 24, "layer_types": ["full_attention"] * 2}),
    "ministral": ("ministral", {"sliding_window": 24, "layer_types": ALTERNATING[::-1]}),
    "llama, layer types": ("llama", {"layer_types": ["full_attention"] * 2}),
    "qwen2, layer types": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 24, "layer_types": ALTERNATING[::-1]},
    ),
    "qwen3, max_window_layers": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1, "layer_types": ...},
    ),
    "qwen3, window not used": ("qwen3", {"use_sliding_window": False, "sliding_window": 24, "layer_types": ...}),
}


@pytest.mark.parametrize("case", COMPUTED)
def test_what_is_computed_equals_transformers(case: str, tiny_model: Any, tmp_path: Path) -> None:
    model_type, changes = COMPUTED[case]
    folder = changed(tiny_model(model_type), tmp_path, changes)
    token_ids = torch.randint(0, 320, (150,), generator=torch.Generator().manual_seed(1)).tolist()

    logits = StepRunner(load_decoder(folder)).step({0: token_ids}, all_rows=True)

    torch.testing.assert_close(logits, reference_logits(folder, token_ids), atol=1e-4, rtol=1e-4)


def changed(folder: Path, tmp_path: Path, changes: dict[str, Any]) -> Path:
    """Copy the model and set fields of its ``config.json``; ``...`` takes a field away."""
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    path = copy / "config.json"
    entries = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in entries.items() if value is not ...}))
    return copy
