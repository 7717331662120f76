"""SmolLM2-135M-Instruct against transformers on the same weights, in float32, over real prompts."""

import warnings
from typing import Any

import pytest
import torch
from step_runner import StepRunner, greedy

from disagg.engine.model.decoder import Decoder
from disagg.models.locate import ModelFiles
from disagg.models.tokenizer import load_tokenizer

MAX_LOGIT_ERROR = 1e-3


def first_prompts(default_model: ModelFiles, prompts: dict[str, list[str]], num_each: int) -> list[list[int]]:
    tokenizer = load_tokenizer(default_model)
    texts = [text for texts in prompts.values() for text in texts[:num_each]]
    return [tokenizer.encode(text)[:1024] for text in texts]


def generate(model: Any, prompt: list[int], max_tokens: int) -> list[int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=max_tokens,
            do_sample=False,
        )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


@torch.inference_mode()
def test_logits_of_real_prompts_are_those_of_transformers(
    default_model: ModelFiles, default_decoder: Decoder, reference_model: Any, real_prompts: dict[str, list[str]]
) -> None:
    for token_ids in first_prompts(default_model, real_prompts, 2):
        logits = StepRunner(default_decoder).step({0: token_ids}, all_rows=True)

        error = (logits - reference_model(torch.tensor([token_ids])).logits[0]).abs().max()

        assert error < MAX_LOGIT_ERROR


@torch.inference_mode()
def test_greedy_tokens_are_the_likeliest_ones_of_transformers(
    default_model: ModelFiles, default_decoder: Decoder, reference_model: Any, real_prompts: dict[str, list[str]]
) -> None:
    """15 prompts, decoded in one batch. One pass of transformers over prompt and answer judges every token."""
    prompts = first_prompts(default_model, real_prompts, 5)

    answers = greedy(default_decoder, prompts, max_tokens=16)

    for prompt, answer in zip(prompts, answers, strict=True):
        logits = reference_model(torch.tensor([prompt + answer]), logits_to_keep=len(answer) + 1).logits[0]
        assert answer == logits[:-1].argmax(-1).tolist()


def test_greedy_tokens_are_those_of_generate(
    default_model: ModelFiles, default_decoder: Decoder, reference_model: Any, real_prompts: dict[str, list[str]]
) -> None:
    prompts = first_prompts(default_model, real_prompts, 1)

    answers = greedy(default_decoder, prompts, max_tokens=16)

    assert answers == [generate(reference_model, prompt, 16) for prompt in prompts]


@pytest.mark.slow
def test_greedy_tokens_are_those_of_generate_over_many_prompts(
    default_model: ModelFiles, default_decoder: Decoder, reference_model: Any, real_prompts: dict[str, list[str]]
) -> None:
    prompts = first_prompts(default_model, real_prompts, 30)

    answers = greedy(default_decoder, prompts, max_tokens=64)

    assert answers == [generate(reference_model, prompt, 64) for prompt in prompts]
