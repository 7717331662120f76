"""Models that only transformers' code computes, over the paged pool: its own logits, or a refusal that says why."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from step_runner import StepRunner
from transformers_logits import reference_logits

from disagg.base.errors import ConfigurationError, UnknownArchitectureError, UnsupportedModelError
from disagg.base.model_code import ModelCode
from disagg.cache.layout import KvDtype, KvFormat, KvLayout
from disagg.engine.kernels.torch_backend import TorchBackend
from disagg.engine.model.transformers_check import check_paged
from disagg.engine.model.transformers_decoder import TransformersDecoder
from disagg.models import locate
from disagg.models.foreign import ForeignModel
from disagg.models.locate import load_served_model_config, locate_model

MakeModel = Callable[..., Path]

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt-neox": ("gpt_neox", {"num_key_value_heads": None, "head_dim": None}),
    "starcoder2-sliding": ("starcoder2", {"sliding_window": 24, "head_dim": None}),
    "cohere": ("cohere", {}),
    "gpt2": ("gpt2", {"num_key_value_heads": 4}),
    "stablelm": ("stablelm", {"head_dim": None}),
    "gemma": ("gemma", {}),
}


def load(folder: Path, max_model_len: int = 512, code: ModelCode = ModelCode.AUTO) -> TransformersDecoder:
    files = locate_model(str(folder))
    config = load_served_model_config(files, code)
    assert isinstance(config, ForeignModel)
    backend = TorchBackend(KvFormat.INTERLEAVED)
    decoder = TransformersDecoder(files, config, backend, torch.float32, torch.device("cpu"), max_model_len)
    layout = KvLayout(
        num_layers=config.num_layers,
        num_blocks=1,
        num_kv_heads=config.num_kv_heads,
        block_size=16,
        head_dim=config.head_dim,
        dtype=KvDtype.FLOAT32,
        format=KvFormat.INTERLEAVED,
    )
    check_paged(decoder, layout)
    return decoder


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_mixed_steps_are_those_of_transformers(name: str, tiny_model: MakeModel) -> None:
    model_type, changes = MODELS[name]
    folder = tiny_model(model_type, **changes)
    token_ids = torch.randint(0, 256, (70,), generator=torch.Generator().manual_seed(1)).tolist()
    other = token_ids[::-1]
    cuts = [0, 30, 68, 69, 70]

    with torch.inference_mode():
        runner = StepRunner(load(folder), num_blocks=16)
        rows = [runner.step({0: other[start:end], 1: token_ids[start:end]}) for start, end in itertools.pairwise(cuts)]

    for sequence, ids in enumerate((other, token_ids)):
        expected = reference_logits(folder, ids)[[end - 1 for end in cuts[1:]]]
        torch.testing.assert_close(torch.stack([row[sequence] for row in rows]), expected, atol=1e-4, rtol=1e-4)


def test_a_step_may_want_no_logits(tiny_model: MakeModel) -> None:
    model_type, changes = MODELS["gpt-neox"]
    with torch.inference_mode():
        runner = StepRunner(load(tiny_model(model_type, **changes)), num_blocks=4)
        assert runner.step({0: [1, 2, 3]}, no_rows=True).shape == (0, 320)


def test_an_architecture_of_ours_is_computed_by_transformers_on_demand(tiny_model: MakeModel) -> None:
    folder = tiny_model("llama")
    with torch.inference_mode():
        logits = StepRunner(load(folder, code=ModelCode.TRANSFORMERS), num_blocks=4).step({0: [5, 6, 7]})

    torch.testing.assert_close(logits, reference_logits(folder, [5, 6, 7])[-1:], atol=1e-4, rtol=1e-4)


class TestRefusals:
    def test_attention_that_is_not_asked_for(self, tiny_model: MakeModel) -> None:
        """Bloom's positions are in its own attention, which calls nobody."""
        folder = tiny_model("bloom", max_position_embeddings=512)
        with pytest.raises(UnsupportedModelError, match=r"BloomForCausalLM.*cannot be served"):
            load(folder)

    def test_layers_that_keep_a_state(self, tiny_model: MakeModel) -> None:
        with pytest.raises(UnsupportedModelError, match=r"layers \[\] out of 2"):
            load(tiny_model("mamba"))

    def test_a_longrope_that_would_turn_with_the_batch(self, tiny_model: MakeModel) -> None:
        rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
        folder = tiny_model("phi3", rope_parameters=rope, original_max_position_embeddings=64)
        with pytest.raises(UnsupportedModelError, match="--max-model-len 64"):
            load(folder, code=ModelCode.TRANSFORMERS)
        load(folder, max_model_len=64, code=ModelCode.TRANSFORMERS)

    def test_what_writes_no_text(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
        with pytest.raises(UnsupportedModelError, match="'BertModel' is no causal language model"):
            load_served_model_config(locate_model(str(tmp_path)), ModelCode.AUTO)

    def test_without_the_extra_the_error_names_it(self, tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
        files = locate_model(str(tiny_model("gpt_neox", **MODELS["gpt-neox"][1])))
        with pytest.raises(UnknownArchitectureError, match="GPTNeoXForCausalLM"):
            load_served_model_config(files, ModelCode.NATIVE)
        monkeypatch.setattr(locate, "has_transformers", lambda: False)
        with pytest.raises(UnsupportedModelError, match=r"disagg\[transformers\]"):
            load_served_model_config(files, ModelCode.AUTO)
        with pytest.raises(ConfigurationError, match=r"not installed.*disagg\[transformers\]"):
            load_served_model_config(files, ModelCode.TRANSFORMERS)
