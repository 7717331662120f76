"""``disagg models``."""

import json
from pathlib import Path

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
        ),
        ModelListing(name="odd/one", kind=ModelKind.HF_FOLDER, problem="MambaForCausalLM is not supported"),
    ]
    monkeypatch.setattr(listing, "list_models", lambda: found)


def test_a_table_for_people():
    lines = CliRunner().invoke(main, ["models"]).output.splitlines()
    assert lines[1].split() == ["tiny", "LlamaForCausalLM", "134", "M", "8192", "3MiB"]
    assert "MambaForCausalLM is not supported" in lines[2]
    assert "disagg serve PATH" in lines[-1]


def test_json_for_scripts():
    first, second = json.loads(CliRunner().invoke(main, ["models", "--json"]).output)
    assert (first["name"], first["kind"], first["path"]) == ("tiny", "gguf", "tiny.gguf")
    assert "not supported" in second["problem"]
