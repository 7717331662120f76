"""A decoder as one native call against the same decoder composed of the backend's single operations."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import make_batch, num_threads, steps, windows
from native_kernels import BACKENDS, FASTEST, backends, dtypes

from disagg.base.errors import InternalError
from disagg.engine.kernels.composed_decoder import ComposedDecoder, decoder_stack
from disagg.engine.kernels.interface import (
    NOT_FINITE,
    UNDECIDED,
    DecoderSettings,
    DecoderWeights,
    DenseMlp,
    KernelBackend,
    LayerSettings,
    LayerWeights,
    Linear,
    LogitBounds,
    SparseMlp,
)
from disagg.engine.kernels.torch_backend import TorchBackend
from disagg.engine.model.sampler import most_likely
from disagg.models.config import Activation
from disagg.models.shape import Experts, NormPlacement, QkNorm

HIDDEN, INTERMEDIATE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 96, 160, 4, 2, 64, 16
VOCAB = 256
PARTS: tuple[dict[str, Any], ...] = (
    {},
    {"softcap": 5.0, "logits": LogitBounds(1.0, 3.0)},
    {"residual_multiplier": 0.22, "logits": LogitBounds(0.125)},
)
"""What Llama, Gemma 2 and Granite do differently."""


def make_weights(
    backend: KernelBackend,
    dtype: torch.dtype,
    num_layers: int,
    qk_norm: QkNorm = QkNorm.NONE,
    placement: NormPlacement = NormPlacement.BEFORE,
    activation: Activation = Activation.SILU,
    experts: Experts | None = None,
) -> DecoderWeights:
    torch.manual_seed(0)
    q_heads, k_heads = {QkNorm.NONE: (0, 0), QkNorm.HEADS: (1, 1), QkNorm.ROWS: (NUM_HEADS, NUM_KV_HEADS)}[qk_norm]
    before, after = placement is not NormPlacement.AFTER, placement is not NormPlacement.BEFORE

    def linear(out_features: int, in_features: int) -> Linear:
        return backend.linear((torch.randn(out_features, in_features) * in_features**-0.5).to(dtype), None)

    def norm(width: int) -> torch.Tensor:
        return torch.rand(width).to(dtype)

    def optional(wanted: int, width: int) -> torch.Tensor | None:
        return norm(wanted * width) if wanted else None

    def mlp(inner: int = INTERMEDIATE) -> DenseMlp:
        return DenseMlp(gate_up=linear(2 * inner, HIDDEN), down=linear(HIDDEN, inner), activation=activation)

    def sparse_mlp(experts: Experts) -> SparseMlp:
        shared = experts.shared_intermediate_size
        return SparseMlp(
            router=linear(experts.num_router_rows, HIDDEN),
            experts=tuple(mlp(experts.intermediate_size) for _ in range(experts.num_experts)),
            num_per_token=experts.num_per_token,
            normalize_weights=experts.normalize_weights,
            shared=mlp(shared) if shared else None,
        )

    layers = [
        LayerWeights(
            attention_norm=optional(before, HIDDEN),
            qkv=linear((NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM, HIDDEN),
            q_norm=optional(q_heads, HEAD_DIM),
            k_norm=optional(k_heads, HEAD_DIM),
            attention_output=linear(HIDDEN, NUM_HEADS * HEAD_DIM),
            mlp_norm=optional(before, HIDDEN),
            mlp=mlp() if experts is None else sparse_mlp(experts),
            attention_output_norm=optional(after, HIDDEN),
            mlp_output_norm=optional(after, HIDDEN),
        )
        for _ in range(num_layers)
    ]
    return DecoderWeights(
        embeddings=torch.randn(VOCAB, HIDDEN).to(dtype),
        layers=tuple(layers),
        norm=norm(HIDDEN),
        head=linear(VOCAB, HIDDEN),
    )


def make_settings(*sliding_windows: int | None, num_positions: int = 300) -> DecoderSettings:
    angles = torch.rand((num_positions, HEAD_DIM // 2), generator=torch.Generator().manual_seed(1)) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    layers = tuple(LayerSettings(cos_sin, window) for window in sliding_windows)
    return DecoderSettings(NUM_HEADS, NUM_KV_HEADS, 1e-5, HEAD_DIM**-0.5, layers)


def make_pool(num_layers: int, num_blocks: int, dtype: torch.dtype) -> torch.Tensor:
    shape = (num_layers, num_blocks, 2, NUM_KV_HEADS, BLOCK_SIZE * HEAD_DIM)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    name=backends,
    dtype=dtypes,
    lengths=steps,
    window=windows,
    qk_norm=st.sampled_from(QkNorm),
    placement=st.sampled_from(NormPlacement),
    activation=st.sampled_from(Activation),
    parts=st.sampled_from(PARTS),
    threads=st.sampled_from([1, 2]),
    as_list=st.booleans(),
)
def test_one_call_gives_the_bits_of_the_single_operations(
    name: str,
    dtype: torch.dtype,
    lengths: list[tuple[int, int]],
    window: int | None,
    qk_norm: QkNorm,
    placement: NormPlacement,
    activation: Activation,
    parts: dict[str, Any],
    threads: int,
    as_list: bool,
) -> None:
    backend = BACKENDS[name]
    batch, num_blocks = make_batch(lengths, BLOCK_SIZE)
    weights = make_weights(backend, dtype, 2, qk_norm, placement, activation)
    decoder_settings = dataclasses.replace(make_settings(None, window), **parts)
    pools = make_pool(2, num_blocks, dtype), make_pool(2, num_blocks, dtype)
    fused = decoder_stack(backend, weights, decoder_settings)
    assert not isinstance(fused, ComposedDecoder)
    expected = ComposedDecoder(backend, weights, decoder_settings)(pools[0], batch)
    best = np.full(len(batch.logit_rows), UNDECIDED, dtype=np.int64)
    with num_threads(threads):
        got = fused(list(pools[1]) if as_list else pools[1], dataclasses.replace(batch, most_likely=best))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert best.tolist() == most_likely(expected, None)
    torch.testing.assert_close(*pools, rtol=0, atol=0)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("threads", [1, 2])
def test_parts_of_the_vocabulary_may_lack_a_finite_maximum(name: str, fault: float, threads: int) -> None:
    batch, num_blocks = make_batch([(20, 1), (9, 1)], BLOCK_SIZE)
    bias = torch.zeros(VOCAB)
    bias[VOCAB // 2 :] = fault
    head = BACKENDS[name].linear(torch.randn(VOCAB, HIDDEN), bias)
    weights = dataclasses.replace(make_weights(BACKENDS[name], torch.float32, 1), head=head)
    best = np.full(2, UNDECIDED, dtype=np.int64)
    with num_threads(threads):
        stack = decoder_stack(BACKENDS[name], weights, make_settings(None))
        logits = stack(make_pool(1, num_blocks, torch.float32), dataclasses.replace(batch, most_likely=best))
    assert best.tolist() == most_likely(logits, None)
    assert (best == NOT_FINITE).all() == (fault != -math.inf)


@st.composite
def experts_of_a_layer(draw: st.DrawFn) -> Experts:
    num_experts = draw(st.integers(1, 9))
    return Experts(
        num_experts=num_experts,
        num_per_token=draw(st.integers(1, num_experts)),
        intermediate_size=draw(st.sampled_from([16, 50, 160])),
        normalize_weights=draw(st.booleans()),
        shared_intermediate_size=draw(st.sampled_from([0, 64, 224])),
    )


@settings(max_examples=60, deadline=None)
@given(name=backends, dtype=dtypes, lengths=steps, experts=experts_of_a_layer(), threads=st.sampled_from([1, 2]))
def test_a_mixture_of_experts_is_the_sum_that_its_definition_says(
    name: str, dtype: torch.dtype, lengths: list[tuple[int, int]], experts: Experts, threads: int
) -> None:
    """One layer: in a second one a last bit may already choose another expert."""
    backend = BACKENDS[name]
    batch, num_blocks = make_batch(lengths, BLOCK_SIZE)
    weights, decoder_settings = make_weights(backend, dtype, 1, experts=experts), make_settings(None)
    pools = make_pool(1, num_blocks, dtype), make_pool(1, num_blocks, dtype)
    expected = ComposedDecoder(backend, weights, decoder_settings)(pools[0], batch)
    with num_threads(threads):
        got = decoder_stack(backend, weights, decoder_settings)(pools[1], batch)
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rows", [[], [4, 0, 4]])
def test_only_the_wanted_rows_are_returned_in_their_order(rows: list[int]) -> None:
    batch, num_blocks = make_batch([(20, 4), (9, 1)], BLOCK_SIZE)
    wanted = dataclasses.replace(batch, logit_rows=torch.tensor(rows, dtype=torch.int64))
    weights, decoder_settings = make_weights(FASTEST, torch.float32, 1), make_settings(None)
    out = [
        build(make_pool(1, num_blocks, torch.float32), wanted)
        for build in (
            decoder_stack(FASTEST, weights, decoder_settings),
            ComposedDecoder(FASTEST, weights, decoder_settings),
        )
    ]
    assert out[0].shape == (len(rows), VOCAB)
    torch.testing.assert_close(*out, rtol=0, atol=0)


def test_pools_may_change_from_step_to_step() -> None:
    batch, num_blocks = make_batch([(20, 1)], BLOCK_SIZE)
    stack = decoder_stack(FASTEST, make_weights(FASTEST, torch.float32, 1), make_settings(None))
    one, other = make_pool(1, num_blocks, torch.float32), torch.zeros_like(make_pool(1, num_blocks, torch.float32))
    first, second = stack(one, batch), stack(other, batch)
    assert not torch.equal(first, second)
    torch.testing.assert_close(stack(one, batch), first, rtol=0, atol=0)


@pytest.mark.parametrize("threads", [1, 2])
def test_layers_are_counted_where_somebody_reads_the_count(threads: int) -> None:
    batch, num_blocks = make_batch([(40, 20), (9, 1)], BLOCK_SIZE)
    stack = decoder_stack(FASTEST, make_weights(FASTEST, torch.float32, 3), make_settings(None, None, None))
    assert stack.counts_layers
    word = np.array([7 << 16], dtype=np.uint64)
    with num_threads(threads):
        counted = stack(make_pool(3, num_blocks, torch.float32), dataclasses.replace(batch, progress=word.ctypes.data))
        uncounted = stack(make_pool(3, num_blocks, torch.float32), batch)
    assert word.tolist() == [(7 << 16) + 3]
    torch.testing.assert_close(counted, uncounted, rtol=0, atol=0)


def test_a_backend_that_does_not_fuse_a_decoder_composes_it() -> None:
    backend = TorchBackend(FASTEST.kv_format)
    weights = make_weights(backend, torch.float32, 1)
    assert isinstance(decoder_stack(backend, weights, make_settings(None)), ComposedDecoder)
    assert FASTEST.fuse_decoder(weights, make_settings(None)) is None


def test_what_does_not_fit_is_refused() -> None:
    weights = make_weights(FASTEST, torch.float32, 1)
    batch, num_blocks = make_batch([(40, 1)], BLOCK_SIZE)
    pool = make_pool(1, num_blocks, torch.float32)
    with pytest.raises(InternalError, match="40 tokens, angles for 39"):
        decoder_stack(FASTEST, weights, make_settings(None, num_positions=39))(pool, batch)
    fused = decoder_stack(FASTEST, weights, make_settings(None))
    with pytest.raises(InternalError, match="2 KV layers and 2 steps for 1 layers"):
        fused([pool[0], pool[0]], batch)
    with pytest.raises(InternalError, match=r"torch\.bfloat16.*contiguous elements of torch\.float32"):
        fused(pool.bfloat16(), batch)
    batch.token_ids[0] = VOCAB
    with pytest.raises(InternalError, match="token id 256 of a vocabulary of 256"):
        fused(pool, batch)
    batch.token_ids[0] = 0
    batch.logit_rows[0] = 1
    with pytest.raises(InternalError, match="wanted row 1 of 1"):
        fused(pool, batch)
