"""The text of a model that takes images too, against transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from step_runner import StepRunner
from transformers_logits import load_decoder, reference_logits

from disagg.models.locate import load_config, locate_model
from disagg.models.text_part import text_entries, text_tensor_name

TEXT = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 24,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    config: Any = Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4, image_token_index=319)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("gemma3-with-images")
    Gemma3ForConditionalGeneration(config).save_pretrained(path)
    return path


def test_logits_are_those_of_the_whole_model(folder: Path) -> None:
    token_ids = torch.randint(0, 300, (150,), generator=torch.Generator().manual_seed(1)).tolist()
    logits = StepRunner(load_decoder(folder)).step({0: token_ids}, all_rows=True)
    torch.testing.assert_close(logits, reference_logits(folder, token_ids), atol=1e-4, rtol=1e-4)


def test_what_a_published_file_leaves_out_is_as_in_transformers(tmp_path: Path) -> None:
    entries = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "eos_token_id": [1, 106],
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "torch_dtype": "bfloat16",
        "vision_config": {"hidden_size": 1152},
    }
    (tmp_path / "config.json").write_text(json.dumps(entries))
    (tmp_path / "model.safetensors").write_bytes(b"")
    config = load_config(locate_model(str(tmp_path)))
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (34, 8, 4, 256)
    assert (config.vocab_size, config.max_position_embeddings) == (262_208, 131_072)
    assert (config.eos_token_ids, config.stored_dtype, config.tie_word_embeddings) == ((1, 106), "bfloat16", True)
    assert [layer for layer, window in enumerate(config.sliding_windows) if window is None] == [5, 11, 17, 23, 29]


def test_other_models_are_left_as_they_are() -> None:
    entries = {"architectures": ["LlamaForCausalLM"], "text_config": {}}
    assert text_entries(entries) is entries


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ("language_model.model.norm.weight", "model.norm.weight"),
        ("model.language_model.norm.weight", "model.norm.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("model.norm.weight", "model.norm.weight"),
        ("vision_tower.embeddings.patch_embedding.bias", None),
        ("model.multi_modal_projector.mm_soft_emb_norm.weight", None),
    ],
)
def test_names_of_tensors(stored: str, name: str | None) -> None:
    assert text_tensor_name(stored) == name
