"""Sampling defaults and end-of-sequence ids: which file says what, and what is said of values that are of no use."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from gguf_writing import LLAMA_METADATA, write_gguf

from disagg.base.errors import ConfigurationError
from disagg.models.generation_config import GenerationDefaults, end_token_ids, load_generation_config
from disagg.models.locate import ModelFiles, ModelKind, load_config, locate_model
from disagg.models.tokenizer import load_tokenizer

QWEN = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05, "do_sample": True}


@pytest.fixture
def folder(tiny_model: Any, tmp_path: Path) -> Path:
    """A model whose files may be changed: tokenizer eos 257, config eos 257."""
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))


def write(folder: Path, name: str, **changes: Any) -> None:
    """Set entries of a JSON file, which may be new; ``...`` takes an entry away."""
    path = folder / name
    entries = (json.loads(path.read_text()) if path.is_file() else {}) | changes
    path.write_text(json.dumps({key: value for key, value in entries.items() if value is not ...}))


def ends(folder: Path) -> tuple[int, ...]:
    files = locate_model(str(folder))
    return end_token_ids(load_config(files), load_tokenizer(files), load_generation_config(files))


class TestEndTokens:
    def test_every_file_counts(self, folder: Path) -> None:
        write(folder, "config.json", eos_token_id=5)
        write(folder, "generation_config.json", eos_token_id=[7, 5])

        assert sorted(ends(folder)) == [5, 7, 257]

    @pytest.mark.parametrize("stated", [None, ...])
    def test_the_tokenizers_own_is_enough(self, folder: Path, stated: Any) -> None:
        write(folder, "config.json", eos_token_id=stated)
        (folder / "generation_config.json").unlink(missing_ok=True)

        assert ends(folder) == (257,)

    @pytest.mark.parametrize("token_id", [-1, 320, 99_999])
    def test_one_that_cannot_be_written_is_left_out_and_warned_of(
        self, folder: Path, token_id: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        write(folder, "config.json", eos_token_id=token_id)
        write(folder, "generation_config.json", eos_token_id=[token_id])

        with caplog.at_level(logging.WARNING):
            assert ends(folder) == (257,)
        assert f"eos_token_id {token_id} is outside the vocabulary of 320" in caplog.text

    def test_where_no_other_is_there_it_is_refused(self, folder: Path) -> None:
        write(folder, "config.json", eos_token_id=-1)
        write(folder, "generation_config.json", eos_token_id=...)
        write(folder, "tokenizer_config.json", eos_token=...)

        with pytest.raises(ConfigurationError, match=r"eos_token_id -1 .*no other token ends.*config\.json"):
            ends(folder)

    def test_a_model_may_have_none(self, folder: Path) -> None:
        write(folder, "config.json", eos_token_id=None)
        write(folder, "generation_config.json", eos_token_id=...)
        write(folder, "tokenizer_config.json", eos_token=None)

        assert ends(folder) == ()


class TestDefaults:
    def test_the_models_own_file(self, folder: Path) -> None:
        write(folder, "generation_config.json", **QWEN, max_new_tokens=2048, min_p=None)

        assert load_generation_config(locate_model(str(folder))).defaults == GenerationDefaults(
            temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05, max_tokens=2048
        )

    def test_vllm_means_none(self, folder: Path) -> None:
        write(folder, "generation_config.json", **QWEN)

        assert load_generation_config(locate_model(str(folder)), "vllm").defaults == GenerationDefaults()

    def test_another_folder(self, folder: Path, tmp_path: Path) -> None:
        write(tmp_path, "generation_config.json", temperature=0, eos_token_id=9)

        chosen = load_generation_config(locate_model(str(folder)), str(tmp_path))

        assert (chosen.defaults, chosen.eos_token_ids) == (GenerationDefaults(temperature=0.0), (9,))

    def test_a_folder_without_one_is_named(self, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match=r"nowhere.*'auto'.*'vllm'"):
            load_generation_config(locate_model(str(folder)), str(tmp_path / "nowhere"))

    def test_old_models_have_them_in_config_json(self, folder: Path) -> None:
        (folder / "generation_config.json").unlink()
        write(folder, "config.json", temperature=0.6)

        assert load_generation_config(locate_model(str(folder))).defaults.temperature == 0.6

    @pytest.mark.parametrize("entry", [{"temperature": "hot"}, {"top_k": 2.5}, {"top_p": True}])
    def test_a_value_of_the_wrong_type_is_named(self, folder: Path, entry: dict[str, Any]) -> None:
        write(folder, "generation_config.json", **entry)

        with pytest.raises(ConfigurationError, match=rf"generation_config\.json: '{next(iter(entry))}' should be"):
            load_generation_config(locate_model(str(folder)))

    def test_what_no_server_does_is_named(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        write(folder, "generation_config.json", suppress_tokens=[3], num_beams=1, no_repeat_ngram_size=0)

        with caplog.at_level(logging.WARNING):
            load_generation_config(locate_model(str(folder)))

        assert "suppress_tokens = [3] is not applied" in caplog.text
        assert "num_beams" not in caplog.text

    def test_a_gguf_files_sampling_keys(self, tmp_path: Path) -> None:
        keys = {"general.sampling.temp": 0.5, "general.sampling.top_k": 20}
        path = write_gguf(tmp_path / "model.gguf", "llama", LLAMA_METADATA | keys, {})

        chosen = load_generation_config(ModelFiles(name="m", kind=ModelKind.GGUF, path=path))

        assert chosen.defaults == GenerationDefaults(temperature=0.5, top_k=20)
