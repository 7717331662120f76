"""Sampling: the right distribution, the same choice whatever the batch, and vLLM's meaning of every parameter."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg.base.sampling import SamplingParams
from disagg.engine.kernels.interface import ChoosesTokens
from disagg.engine.kernels.select import BACKENDS, select_backend
from disagg.engine.model.adjustments import SamplingRow, adjust_logits
from disagg.engine.model.logprobs import position_logprobs
from disagg.engine.model.sampler import SampledToken, chooser_of, sample

VOCAB = 1000


@pytest.fixture(scope="module", params=BACKENDS)
def chooser(request: pytest.FixtureRequest) -> ChoosesTokens | None:
    """What each kernel backend of the CPU does by itself."""
    return chooser_of(select_backend(torch.device("cpu"), torch.float32, request.param))


def row(prompt: tuple[int, ...] = (1, 2, 3), output: tuple[int, ...] = (), **params: Any) -> SamplingRow:
    settings = {"max_tokens": 100, "seed": 0} | params
    return SamplingRow(SamplingParams(**settings), prompt, output, eos_token_ids=(0,))


def logits_like_a_model(num_rows: int, seed: int = 0, vocab_size: int = VOCAB) -> torch.Tensor:
    """A few likely tokens over a long tail."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, vocab_size, generator=generator) * 2
    logits[:, : vocab_size // 50] += 4
    return logits


def chosen(logits: torch.Tensor, rows: list[SamplingRow], chooser: ChoosesTokens | None = None) -> list[SampledToken]:
    """Sample from sound rows."""
    tokens = [token for token in sample(logits, rows, chooser) if token is not None]
    assert len(tokens) == len(rows)
    return tokens


def draw(chooser: ChoosesTokens | None, logits: torch.Tensor, num_draws: int, **params: Any) -> np.ndarray:
    """Return how often each token is drawn, over as many positions."""
    rows = [row(tuple(range(position)), **params) for position in range(num_draws)]
    tokens = [token.token_id for token in chosen(logits.repeat(num_draws, 1), rows, chooser)]
    return np.bincount(tokens, minlength=logits.shape[-1])


def chi_square_fits(counts: np.ndarray, probabilities: np.ndarray) -> bool:
    """Compare at a level of about 1e-4; cells that expect fewer than five are put together."""
    expected = probabilities * counts.sum()
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    freedom = len(wanted) - 1
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    return bool(statistic < freedom + 4 * math.sqrt(2 * freedom) + 12)


def truncated(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """Probabilities after vLLM's truncation, the slow and obvious way."""
    probabilities = (logits.double() / temperature).softmax(-1)
    probabilities[probabilities < min_p * probabilities.max()] = 0
    if top_k:
        probabilities[probabilities < probabilities.topk(min(top_k, len(probabilities))).values[-1]] = 0
    probabilities /= probabilities.sum()
    ordered, ids = probabilities.sort(descending=True)
    before = ordered.cumsum(0) - ordered
    probabilities[ids[before >= top_p]] = 0
    return probabilities / probabilities.sum()


UNLIKE: list[tuple[dict[str, Any], float]] = [({}, 0.5), ({"top_p": 0.9}, 2.0)]
"""With a truncation and without."""


class TestDistribution:
    @pytest.mark.parametrize(
        "params",
        [
            {},
            {"temperature": 0.5},
            {"temperature": 3.0},
            {"top_k": 10},
            {"top_p": 0.8},
            {"top_p": 0.999, "temperature": 2.0},
            {"min_p": 0.2},
            {"top_k": 300, "top_p": 0.99, "min_p": 1e-5},
            {"top_k": 5000},
        ],
        ids=str,
    )
    def test_frequencies_are_those_of_the_truncated_softmax(
        self, chooser: ChoosesTokens | None, params: dict[str, Any]
    ) -> None:
        logits = logits_like_a_model(1)

        counts = draw(chooser, logits, 4000, **params)

        arguments = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | params
        expected = truncated(logits[0], **arguments).numpy()
        assert counts[expected == 0].sum() == 0
        assert chi_square_fits(counts, expected)

    @pytest.mark.parametrize(
        ("params", "spread"),
        [
            pytest.param(
                params, spread, marks=() if (params, spread) in UNLIKE else pytest.mark.slow, id=f"{params}-{spread}"
            )
            for params in ({}, {"top_p": 0.9}, {"top_k": 30_000})
            for spread in (0.01, 0.5, 2.0)
        ],
    )
    def test_unlikely_tokens_come_as_often_as_they_should(
        self, chooser: ChoosesTokens | None, params: dict[str, Any], spread: float
    ) -> None:
        """Most or all tokens are; cells are put together by likelihood, and by place."""
        logits = spread * torch.randn(1, 20_000, generator=torch.Generator().manual_seed(3))
        expected = truncated(logits[0], 1.0, params.get("top_k", 0), params.get("top_p", 1.0), 0.0).numpy()
        counts = sum(draw(chooser, logits, 500, seed=seed, **params) for seed in range(12))

        order = np.argsort(expected, kind="stable")
        assert chi_square_fits(counts[order].reshape(50, -1).sum(1), expected[order].reshape(50, -1).sum(1))
        assert chi_square_fits(counts.reshape(50, -1).sum(1), expected.reshape(50, -1).sum(1))

    def test_impossible_tokens_are_never_drawn(self, chooser: ChoosesTokens | None) -> None:
        logits = torch.full((1, 20_000), -math.inf)
        logits[0, [5, 17]] = 0.0

        counts = draw(chooser, logits, 500)

        assert set(np.flatnonzero(counts)) == {5, 17}

    def test_seeds_are_independent(self, chooser: ChoosesTokens | None) -> None:
        logits = logits_like_a_model(1)
        rows = [row(seed=seed) for seed in range(2000)]

        counts = np.bincount(
            [token.token_id for token in chosen(logits.repeat(2000, 1), rows, chooser)], minlength=VOCAB
        )

        assert chi_square_fits(counts, logits[0].softmax(-1).double().numpy())


any_params = st.fixed_dictionaries(
    {
        "seed": st.integers(-(2**63), 2**64 - 1),
        "temperature": st.sampled_from([0.0, 1e-6, 0.3, 1.0, 1.7]),
        "top_k": st.sampled_from([0, 1, 5, 900]),
        "top_p": st.sampled_from([1.0, 0.9, 0.1]),
        "min_p": st.sampled_from([0.0, 0.05]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "presence_penalty": st.sampled_from([0.0, -0.5]),
        "frequency_penalty": st.sampled_from([0.0, 0.7]),
        "logit_bias": st.sampled_from([(), ((4, 5.0), (9, -100.0))]),
        "min_tokens": st.sampled_from([0, 6]),
        "stop_token_ids": st.sampled_from([(), (7, 8)]),
        "logprobs": st.sampled_from([None, 0, 3]),
    }
)
any_tokens = st.lists(st.integers(0, VOCAB - 1), max_size=8).map(tuple)
any_row = st.tuples(any_tokens.map(lambda tokens: (1, *tokens)), any_tokens, any_params)


class TestBatchIndependence:
    @settings(deadline=None, max_examples=60)
    @given(st.lists(any_row, min_size=1, max_size=6), st.integers(0, 100))
    def test_a_row_is_sampled_the_same_alone_and_in_company(
        self, chooser: ChoosesTokens | None, specs: list[Any], seed: int
    ) -> None:
        logits = logits_like_a_model(len(specs), seed)

        together = sample(logits.clone(), [row(prompt, output, **params) for prompt, output, params in specs], chooser)

        for index, (prompt, output, params) in enumerate(specs):
            (alone,) = sample(logits[index : index + 1].clone(), [row(prompt, output, **params)], chooser)
            assert alone == together[index]

    @settings(deadline=None)
    @given(any_row)
    def test_a_resumed_sequence_goes_on_as_it_would_have(self, chooser: ChoosesTokens | None, spec: Any) -> None:
        """Tokens handed over at the start are as good as tokens appended one by one."""
        prompt, output, params = spec
        grown = row(prompt, **params)
        for token_id in output:
            grown.append(token_id)
        logits = logits_like_a_model(1)

        assert sample(logits.clone(), [grown], chooser) == sample(
            logits.clone(), [row(prompt, output, **params)], chooser
        )

    def test_a_tiny_change_of_the_logits_seldom_changes_the_choice(self, chooser: ChoosesTokens | None) -> None:
        """Other batches and kernels round otherwise: noise belongs to tokens, not to places in a cumulative sum."""
        logits = logits_like_a_model(500)
        rows = [row(seed=seed) for seed in range(500)]

        before = sample(logits.clone(), rows, chooser)
        after = sample(
            logits + 1e-4 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)), rows, chooser
        )

        assert sum(x != y for x, y in zip(before, after, strict=True)) <= 2

    @pytest.mark.parametrize(
        "params",
        [{"top_k": 15_000}, *(pytest.param(one, marks=pytest.mark.slow) for one in ({}, {"top_p": 0.99}))],
        ids=str,
    )
    def test_nor_does_it_among_unlikely_tokens(self, chooser: ChoosesTokens | None, params: dict[str, Any]) -> None:
        """As much noise as two placements differ by in float32, in one direction over half the vocabulary."""
        generator = torch.Generator().manual_seed(2)
        changed = 0
        for first in range(0, 4000, 250):
            logits = torch.randn(1, 20_000, generator=generator) * 0.3
            noise = 2e-5 * torch.randn(1, 20_000, generator=generator)
            noise += torch.where(torch.arange(20_000) < 10_000, 1e-5, -1e-5)
            rows = [row(seed=seed, **params) for seed in range(first, first + 250)]
            before = chosen(logits.repeat(250, 1), rows, chooser)
            after = chosen((logits + noise).repeat(250, 1), rows, chooser)
            unlikely = logits.log_softmax(-1)[0] < -9
            assert sum(bool(unlikely[token.token_id]) for token in before) > 200
            changed += sum(x != y for x, y in zip(before, after, strict=True))

        assert changed <= 2


class TestGreedy:
    @pytest.mark.parametrize("temperature", [0.0, 1e-30])
    def test_the_likeliest_token(self, chooser: ChoosesTokens | None, temperature: float) -> None:
        logits = logits_like_a_model(5)

        tokens = chosen(logits.clone(), [row(temperature=temperature) for _ in range(5)], chooser)

        assert [token.token_id for token in tokens] == logits.argmax(-1).tolist()

    def test_top_k_of_one_is_greedy(self, chooser: ChoosesTokens | None) -> None:
        logits = logits_like_a_model(5)

        tokens = chosen(logits.clone(), [row(top_k=1, seed=seed) for seed in range(5)], chooser)

        assert [token.token_id for token in tokens] == logits.argmax(-1).tolist()


def naively_adjusted(
    logits: torch.Tensor, prompt: tuple[int, ...], output: tuple[int, ...], params: dict[str, Any]
) -> torch.Tensor:
    """vLLM's order and meaning, token by token."""
    logits = logits.clone()
    if len(output) < params["min_tokens"]:
        logits[[0, *params["stop_token_ids"]]] = -math.inf
    for token_id, bias in params["logit_bias"]:
        logits[token_id] += bias
    for token_id in {*prompt, *output}:
        value = logits[token_id]
        penalty = params["repetition_penalty"]
        logits[token_id] = value / penalty if value > 0 else value * penalty
    for token_id in set(output):
        logits[token_id] -= params["frequency_penalty"] * output.count(token_id) + params["presence_penalty"]
    return logits


class TestAdjustments:
    @settings(deadline=None)
    @given(st.lists(any_row, min_size=1, max_size=4))
    def test_as_a_naive_reference(self, specs: list[Any]) -> None:
        logits = logits_like_a_model(len(specs))
        adjusted = logits.clone()

        adjust_logits(adjusted, [row(prompt, output, **params) for prompt, output, params in specs])

        expected = [naively_adjusted(logits[index], *spec) for index, spec in enumerate(specs)]
        torch.testing.assert_close(adjusted, torch.stack(expected))

    def test_ends_are_forbidden_until_min_tokens(self, chooser: ChoosesTokens | None) -> None:
        logits = torch.zeros(1, VOCAB)
        logits[0, 0] = 50.0

        assert chosen(logits.clone(), [row(output=(5,), min_tokens=2)], chooser)[0].token_id != 0
        assert chosen(logits.clone(), [row(output=(5, 5), min_tokens=2)], chooser)[0].token_id == 0


class TestLogprobs:
    def test_they_are_those_of_the_raw_logits(self, chooser: ChoosesTokens | None) -> None:
        logits = logits_like_a_model(3)
        expected = logits.log_softmax(-1)

        tokens = chosen(
            logits.clone(), [row(logprobs=4, temperature=0.3, logit_bias=((7, 100.0),)) for _ in range(3)], chooser
        )

        for token, values in zip(tokens, expected, strict=True):
            assert token.logprobs is not None
            assert token.logprobs.chosen.token_id == token.token_id == 7
            assert token.logprobs.chosen.logprob == pytest.approx(float(values[7]), abs=1e-5)
            assert token.logprobs.chosen.rank == int((values > values[7]).sum()) + 1
            top = values.topk(4)
            assert [entry.token_id for entry in token.logprobs.top] == top.indices.tolist()
            assert [entry.logprob for entry in token.logprobs.top] == pytest.approx(top.values.tolist(), abs=1e-5)
            assert [entry.rank for entry in token.logprobs.top] == [1, 2, 3, 4]

    def test_each_row_gets_what_it_asks_for(self, chooser: ChoosesTokens | None) -> None:
        wanted = [None, 0, 2, None]

        tokens = chosen(logits_like_a_model(4), [row(logprobs=number) for number in wanted], chooser)

        numbers = [None if token.logprobs is None else len(token.logprobs.top) for token in tokens]
        assert numbers == wanted

    def test_of_a_prompt(self) -> None:
        logits = logits_like_a_model(6)
        next_tokens = [3, 1, 4, 1, 5, 9]

        positions = position_logprobs(logits, next_tokens, [2] * 6)

        expected = logits.log_softmax(-1)[range(6), next_tokens].tolist()
        assert [position.chosen.logprob for position in positions if position is not None] == pytest.approx(
            expected, abs=1e-5
        )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("fault", [math.nan, math.inf])
@pytest.mark.parametrize("logprobs", [None, 2])
def test_a_broken_row_has_no_token_and_the_others_have_theirs(
    chooser: ChoosesTokens | None, temperature: float, fault: float, logprobs: int | None
) -> None:
    rows = [row(temperature=temperature, top_p=0.9, logprobs=logprobs) for _ in range(3)]
    sound = sample(logits_like_a_model(3), rows, chooser)
    logits = logits_like_a_model(3)
    logits[1, 7] = fault

    assert sample(logits, rows, chooser) == [sound[0], None, sound[2]]


class TestBlame:
    """Whose fault it is that a row has no token."""

    @pytest.mark.parametrize(
        "params",
        [
            {"repetition_penalty": 1e-300},
            {"logit_bias": ((7, math.inf),)},
            {"min_tokens": 3, "stop_token_ids": tuple(range(VOCAB))},
        ],
        ids=str,
    )
    def test_of_the_parameters(self, chooser: ChoosesTokens | None, params: dict[str, Any]) -> None:
        logits = logits_like_a_model(1)
        spoilt = row(output=(5,), **params)

        assert sample(logits, [spoilt], chooser) == [None]
        assert spoilt.is_to_blame(logits[0])

    @pytest.mark.parametrize("params", [{}, {"repetition_penalty": 1.5, "logit_bias": ((3, 1.0),)}], ids=str)
    def test_of_the_model(self, chooser: ChoosesTokens | None, params: dict[str, Any]) -> None:
        logits = logits_like_a_model(1)
        logits[0, 7] = math.nan
        innocent = row(**params)

        assert sample(logits, [innocent], chooser) == [None]
        assert not innocent.is_to_blame(logits[0])
