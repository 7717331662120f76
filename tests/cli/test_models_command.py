"""``disagg models``."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from disagg.cli.main import main
from disagg.models import listing
from disagg.models.listing import ModelListing
from disagg.models.locate import ModelKind


@pytest.fixture(autouse=True)
def two_models(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        ModelListing(
            name="tiny",
            kind=ModelKind.GGUF,
            path=Path("tiny.gguf"),
            num_bytes=3 << 20,
            architecture="LlamaForCausalLM",
            num_parameters=134_000_000,
            max_position_embeddings=8192,
            kv_bytes=180 << 20,
        ),
        ModelListing(name="odd/one", kind=ModelKind.HF_FOLDER, problem="MambaForCausalLM is not supported"),
    ]
    monkeypatch.setattr(listing, "list_models", lambda: found)


def test_a_table_for_people():
    result = CliRunner().invoke(main, ["models"])
    lines = result.output.splitlines()
    assert result.exit_code == 0, "a cache may hold what nobody asked for"
    assert lines[1].split() == ["tiny", "LlamaForCausalLM", "134", "M", "8192", "180MiB", "3MiB"]
    assert "MambaForCausalLM is not supported" in lines[2]
    assert "disagg serve PATH" in lines[-1]


def test_json_for_scripts():
    first, second = json.loads(CliRunner().invoke(main, ["models", "--json"]).output)
    assert (first["name"], first["kind"], first["path"]) == ("tiny", "gguf", "tiny.gguf")
    assert "not supported" in second["problem"]


def described(*models: Path) -> list[str]:
    result = CliRunner().invoke(main, ["models", "--json", *map(str, models)])
    assert result.exit_code == 2
    output = result.stdout
    return [entry["problem"] or "" for entry in json.loads(output)]


def test_a_named_model_is_described(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama")
    result = CliRunner().invoke(main, ["models", str(folder)])
    row = result.stdout.splitlines()[1]
    assert result.exit_code == 0
    assert row.split()[:2] == [folder.name, "LlamaForCausalLM"]


def test_a_model_that_is_not_there_fails(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["models", str(tmp_path / "absent")])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert "no such model" in result.stderr


def test_what_cannot_be_loaded_says_why(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """One folder for each reason: an architecture, a quantisation, missing weights, pickled weights, nothing at all."""

    def changed(name: str, **entries: Any) -> Path:
        copy = Path(shutil.copytree(tiny_model("llama"), tmp_path / name))
        config = copy / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | entries))
        return copy

    odd = changed("odd", architectures=["BertModel"])
    packed = changed("packed", quantization_config={"quant_method": "awq"})
    bare, pickled = changed("bare"), changed("pickled")
    (bare / "model.safetensors").unlink()
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    problems = described(odd, packed, bare, pickled, tmp_path / "absent")
    assert "'BertModel'" in problems[0]
    assert "quantization_config.quant_method = 'awq' is not supported; supported: unquantised" in problems[1]
    assert "has no model.safetensors" in problems[2]
    assert "pickled weights only" in problems[3]
    assert "no such model" in problems[4]
