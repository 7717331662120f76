"""What the server knows of its model before any process is started."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from disagg.base.config import InstanceGroup, ModelSettings, Placement, ServeSettings
from disagg.base.errors import ConfigurationError
from disagg.base.request import Role
from disagg.models.generation_config import GenerationDefaults
from disagg.serve.launch.api_parts import load_served_model
from disagg.serve.launch.deployment import Deployment


@pytest.fixture
def folder(tiny_model: Any, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))
    settings = {"temperature": 0.5, "top_k": 3, "eos_token_id": [9, 320]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def deployment(folder: Path, **serve: Any) -> Deployment:
    return Deployment(
        placement=Placement(groups=(InstanceGroup(role=Role.COLOCATED, count=1),)),
        model=ModelSettings(model=str(folder)),
        serve=ServeSettings(**serve),
    )


def test_the_models_defaults_and_ends(folder: Path) -> None:
    model = load_served_model(deployment(folder))

    assert model.defaults == GenerationDefaults(temperature=0.5, top_k=3)
    assert sorted(model.eos_token_ids) == [9, 257]


def test_defaults_can_be_switched_off(folder: Path) -> None:
    model = load_served_model(deployment(folder, generation_config="vllm"))

    assert model.defaults == GenerationDefaults()
    assert sorted(model.eos_token_ids) == [9, 257]


@pytest.mark.parametrize("entry", [{"temperature": -1}, {"top_p": 0}, {"top_k": -5}, {"repetition_penalty": 0}])
def test_a_default_that_no_client_could_send_is_refused(folder: Path, entry: dict[str, Any]) -> None:
    (folder / "generation_config.json").write_text(json.dumps(entry))

    with pytest.raises(ConfigurationError, match=rf"generation_config\.json.*{next(iter(entry))}.*--generation-config"):
        load_served_model(deployment(folder))
