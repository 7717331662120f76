"""Fixtures that every room's tests may use: reference data, the default model, tiny models in Hugging Face folders."""

import gzip
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from disagg.base.errors import ConfigurationError
from disagg.models.locate import ModelFiles, locate_model

TinyModel = Callable[..., Path]

# What a test takes says something of the machine and its other work, never of the code.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    beside_checkout = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.addoption(
        "--reference-data",
        default=os.environ.get("DISAGG_REFERENCE_DATA", str(beside_checkout)),
        help="folder of real traces, prompts and measurements; tests that need it are skipped where it is absent",
    )


@pytest.fixture(scope="session")
def reference_data(request: pytest.FixtureRequest) -> Path:
    """The folder of third-party data that is not part of the project."""
    path = Path(request.config.getoption("--reference-data"))
    if not path.is_dir():
        pytest.skip(f"no reference data in {path} (give --reference-data)")
    return path


@pytest.fixture(scope="session")
def real_prompts(reference_data: Path) -> dict[str, list[str]]:
    """Prompts of three well-known sets, by name: ``gsm8k``, ``humaneval``, ``mt_bench``."""
    prompts = {}
    for name in ("gsm8k", "humaneval", "mt_bench"):
        with gzip.open(reference_data / "traces" / f"prompts_{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            entries = [json.loads(line) for line in lines]
        prompts[name] = [entry["prompt"] if "prompt" in entry else entry["turns"][0] for entry in entries]
    return prompts


@pytest.fixture(scope="session")
def default_model() -> ModelFiles:
    """The model that is served when none is named."""
    try:
        return locate_model(None)
    except ConfigurationError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Makes a folder with a tiny randomly initialised model as transformers saves it, with a byte-level tokenizer.

    ``tiny_model("qwen2", num_hidden_layers=3, max_shard_size="100KB")``: a model type of transformers, then anything
    its configuration takes; ``max_shard_size`` splits the weights. Equal calls give the same folder.
    """
    made: dict[str, Path] = {}

    def make(model_type: str = "llama", *, max_shard_size: str = "1GB", seed: int = 0, **overrides: Any) -> Path:
        key = json.dumps([model_type, max_shard_size, seed, overrides], sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp(f"tiny-{model_type}-")
            _save_tiny_model(folder, model_type, max_shard_size, seed, overrides)
            made[key] = folder
        return made[key]

    return make


def _save_tiny_model(folder: Path, model_type: str, max_shard_size: str, seed: int, overrides: dict[str, Any]) -> None:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoConfig, AutoModelForCausalLM

        settings: dict[str, Any] = {
            "vocab_size": 320,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 512,
            "bos_token_id": 256,
            "eos_token_id": 257,
            "pad_token_id": None,
            "initializer_range": 0.3,
        }
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(settings | overrides)))
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    _save_byte_tokenizer(folder)


def _save_byte_tokenizer(folder: Path) -> None:
    """One token per byte, ``<bos>`` 256 and ``<eos>`` 257: text of any kind, and ids that are easy to read."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    from disagg.models.tokenizer import byte_alphabet

    vocabulary = {character: byte for byte, character in byte_alphabet().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<bos>", special=True), AddedToken("<eos>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
    settings = {"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
