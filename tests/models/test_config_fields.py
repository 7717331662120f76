"""The table of fields: complete against transformers, and every limited field refuses by name."""

import dataclasses
import logging
from itertools import product
from typing import Any

import pytest
from test_hf_config import LLAMA, config_of

from disagg.base.errors import UnsupportedModelError
from disagg.models.config_fields import CONFIG_FIELDS, ConfigField, Verdict, check_fields
from disagg.models.families import FAMILIES
from disagg.models.hf_config import config_from_hf

LIMITED = [field for field in CONFIG_FIELDS if field.verdict is Verdict.LIMITED]


@pytest.mark.parametrize("model_type", [name for family in FAMILIES.values() for name in family.model_types])
def test_the_table_knows_all_that_transformers_writes(model_type: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type)
    architecture = next(a for a, family in FAMILIES.items() if model_type in family.model_types)
    own = {field.name: getattr(config, field.name, None) for field in dataclasses.fields(config)}

    assert check_fields({**own, **config.to_dict()}, architecture) == ()


@pytest.mark.parametrize("field", LIMITED, ids=lambda field: field.name)
def test_a_limited_field_takes_its_values_and_refuses_others_by_name(field: ConfigField) -> None:
    """In every architecture that it is of."""
    for architecture, value in product(field.architectures, (None, *field.allowed)):
        assert check_fields({field.name: value}, architecture) == ()
    for architecture, value in product(field.architectures, (0.37, "other", {"some": 1}, [3])):
        with pytest.raises(UnsupportedModelError) as refusal:
            check_fields({field.name: value}, architecture)
        assert field.name in str(refusal.value), architecture
        assert repr(value) in str(refusal.value), architecture


def test_each_field_has_one_verdict_for_an_architecture() -> None:
    pairs = [(field.name, architecture) for field in CONFIG_FIELDS for architecture in field.architectures]

    assert len(pairs) == len(set(pairs))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention_multiplier": 0.0078125}, "attention_multiplier"),
        ({"logits_scaling": 8.0}, "logits_scaling"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"no_rope_layers": [1, 1, 0]}, "no_rope_layers"),
        ({"sliding_window": 64}, "sliding_window"),
        ({"architectures": ["MistralForCausalLM"], "attention_bias": True}, "attention_bias"),
        ({"architectures": ["MistralForCausalLM"], "use_sliding_window": False}, "use_sliding_window"),
        ({"architectures": ["Qwen3ForCausalLM"], "mlp_bias": True}, "mlp_bias"),
        ({"layer_types": ["sliding_attention"] * 16}, "layer_types"),
    ],
)
def test_what_other_families_compute_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        config_of(**changes)


def test_a_field_that_nothing_knows_is_named_in_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        config_from_hf({**LLAMA, "novel_gain": 3.0, "unset": None}, source="/models/new/config.json")

    assert "/models/new/config.json" in caplog.text
    assert "'novel_gain'" in caplog.text
    assert "unset" not in caplog.text
