"""A request that cannot be answered fails alone: what runs beside it, its instances and the server go on."""

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from safetensors.torch import load_file, save_file
from server_process import ServerProcess, completion, serving

SETTINGS = ("--dtype", "float32", "--kv-memory", "16MiB", "--block-size", "16", "--max-batch-tokens", "64")
PLACEMENTS = {"1x1": ("--prefill", "1", "--decode", "1"), "colocated": ("--colocated", "1")}
GOOD = [
    ("the first " * 9, {"temperature": 0.0}),
    ("a second one", {"temperature": 1.0, "seed": 5, "n": 2}),
    ("a third of some length " * 6, {"temperature": 0.8, "seed": 6, "logprobs": 2}),
]
BROKEN_TOKEN = "Z"
SPARED = {ord(BROKEN_TOKEN): -100.0}  # a good answer does not say it either


@pytest.fixture(scope="module")
def broken_model(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model in which the embedding of one token is NaN."""
    folder = tmp_path_factory.mktemp("broken") / "model"
    shutil.copytree(tiny_model("llama"), folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][ord(BROKEN_TOKEN)] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def good(server: ServerProcess, prompt: str, fields: dict[str, Any]) -> list[str]:
    answer = completion(server, prompt, max_tokens=40, ignore_eos=True, logit_bias=SPARED, **fields)
    return [choice.text for choice in answer.choices]


@pytest.mark.parametrize(
    "placement",
    [
        pytest.param(PLACEMENTS["colocated"], id="colocated", marks=pytest.mark.slow),
        pytest.param(PLACEMENTS["1x1"], id="1x1"),
    ],
)
def test_poison_fails_alone(broken_model: str, placement: tuple[str, ...]) -> None:
    every_token = {"min_tokens": 2, "stop_token_ids": list(range(256))}
    forbidden = {str(token): -100.0 for token in range(320)}
    poison: list[tuple[str, dict[str, Any], type[openai.APIStatusError], str]] = [
        ("abc", {"repetition_penalty": 1e-300}, openai.BadRequestError, "'repetition_penalty'.*0.01.*1e-300"),
        ("Z", {}, openai.InternalServerError, "NaN or infinity"),
        ("Zebras" * 20, {"temperature": 0.0}, openai.InternalServerError, "NaN or infinity"),
        ("the first " * 9 + "Z", {"logprobs": 1, "echo": True}, openai.InternalServerError, "NaN or infinity"),
    ]
    with serving(broken_model, *SETTINGS, *placement) as server, ThreadPoolExecutor(8) as pool:
        expected = [good(server, *case) for case in GOOD]
        for _ in range(2):
            under_way = [pool.submit(good, server, *case) for case in GOOD]
            bad = [
                (pool.submit(completion, server, text, max_tokens=4, **fields), kind, words)
                for text, fields, kind, words in poison
            ]
            for request, kind, words in bad:
                with pytest.raises(kind, match=words):
                    request.result()
            assert [request.result() for request in under_way] == expected
        # Harsh, but each can be answered.
        for fields in (
            {"logit_bias": forbidden},
            every_token,
            {"repetition_penalty": 0.01},
            {"repetition_penalty": 100},
            {"temperature": 1e-300},
            {"min_p": 1e-300},
            {"top_p": 5e-324},
        ):
            answer = completion(server, "abc", max_tokens=4, seed=1, **fields)  # by another seed it may say Z itself
            assert answer.usage.completion_tokens > 0
        assert [good(server, *case) for case in GOOD] == expected
        assert all(instance["num_restarts"] == 0 for instance in server.get("/status").json()["instances"])
        assert "Traceback" not in server.text
