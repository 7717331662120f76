"""Tokens that the native kernels choose, at every instruction set, against the sampler's own NumPy."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_kernels import BACKENDS, backends, dtypes

from disagg.base.sampling import SamplingParams
from disagg.engine.kernels.interface import NOT_FINITE, UNDECIDED, DrawSettings
from disagg.engine.model.adjustments import SamplingRow
from disagg.engine.model.sampler import most_likely, sample

any_params = st.fixed_dictionaries(
    {
        "seed": st.integers(-(2**63), 2**64 - 1),
        "temperature": st.sampled_from([1e-5, 0.3, 1.0, 1.7]),
        "top_k": st.sampled_from([0, 1, 5, 900]),
        "top_p": st.sampled_from([1.0, 0.9, 0.1]),
        "min_p": st.sampled_from([0.0, 0.05, 1e-6]),
    }
)


def some_logits(rows: int, width: int, spread: float, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Return logits of which some are forbidden, and many are equal when the spread is small."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, width, generator=generator) * spread).round(decimals=1)
    logits[torch.rand(rows, width, generator=generator) < 0.1] = -math.inf
    logits[:, seed % width] = 0.0
    return logits.to(dtype)


@settings(max_examples=100, deadline=None)
@given(
    name=backends,
    dtype=dtypes,
    rows=st.integers(1, 5),
    width=st.integers(1, 700),
    spread=st.sampled_from([0.1, 3.0, 100.0]),
    seed=st.integers(0, 999),
)
def test_the_first_of_the_largest(
    name: str, dtype: torch.dtype, rows: int, width: int, spread: float, seed: int
) -> None:
    logits = some_logits(rows, width, spread, dtype, seed)

    assert most_likely(logits, BACKENDS[name]) == most_likely(logits, None)


@settings(max_examples=300, deadline=None)
@given(
    name=backends,
    dtype=dtypes,
    width=st.integers(1, 20_000),
    spread=st.sampled_from([0.0, 0.1, 3.0, 100.0]),
    specs=st.lists(any_params, min_size=1, max_size=5),
    seed=st.integers(0, 999),
)
def test_the_same_draws(
    name: str, dtype: torch.dtype, width: int, spread: float, specs: list[dict[str, Any]], seed: int
) -> None:
    """Noise is a function of seed, position and token, so that only ties within rounding could be drawn otherwise."""
    logits = some_logits(len(specs), width, spread, dtype, seed)
    rows = [SamplingRow(SamplingParams(max_tokens=9, **params), range(place + 1)) for place, params in enumerate(specs)]

    assert sample(logits.clone(), rows, BACKENDS[name]) == sample(logits.clone(), rows)


@pytest.mark.parametrize("name", BACKENDS)
def test_rows_of_a_model_are_decided_without_the_whole_row(name: str) -> None:
    """The fast path is one: nearly every row is drawn from its likely tokens."""
    logits = some_logits(500, 5000, 5.0, torch.bfloat16, 0)
    rows = [SamplingRow(SamplingParams(max_tokens=9, seed=seed), [1]) for seed in range(500)]
    drawing = DrawSettings(
        temperature=np.ones(500),
        top_p=np.ones(500),
        min_p=np.zeros(500),
        top_k=np.zeros(500, dtype=np.int32),
        seed=np.arange(500, dtype=np.uint64),
        position=np.ones(500, dtype=np.uint64),
    )

    tokens = BACKENDS[name].draw(logits, drawing, -9.0)

    assert (tokens >= 0).mean() > 0.9
    expected = [token and token.token_id for token in sample(logits, rows)]
    assert all(token in (wanted, UNDECIDED) for token, wanted in zip(tokens.tolist(), expected, strict=True))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", [0, 40, 999])
@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf])
def test_a_row_without_a_finite_maximum_is_told(name: str, dtype: torch.dtype, place: int, fault: float) -> None:
    logits = some_logits(3, 1000, 3.0, dtype, 1)
    if fault == -math.inf:
        logits[1] = fault
    logits[1, place] = fault

    assert [token == NOT_FINITE for token in BACKENDS[name].most_likely(logits)] == [False, True, False]
    for temperature in (0.0, 1.0):
        rows = [SamplingRow(SamplingParams(max_tokens=9, seed=0, temperature=temperature), [1]) for _ in range(3)]
        assert [token is None for token in sample(logits.clone(), rows, BACKENDS[name])] == [False, True, False]
