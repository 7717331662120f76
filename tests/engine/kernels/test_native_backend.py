"""Every native kernel, at every instruction set this processor has, against the PyTorch backend."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import Shape, dirty_pool, fill_pool, make_batch, num_threads, shapes, softcaps, steps, windows
from native_kernels import BACKENDS, backends, dtypes, native

from disagg.base.errors import InternalError
from disagg.cache.layout import KvFormat
from disagg.engine.kernels.int8 import quantize_int8
from disagg.engine.kernels.interface import LogitBounds
from disagg.engine.kernels.torch_backend import TorchBackend
from disagg.models.config import Activation
from disagg.models.shape import QkNorm

REFERENCE = TorchBackend(KvFormat.INTERLEAVED)


@settings(max_examples=80, deadline=None)
@given(name=backends, shape=shapes, lengths=steps, window=windows, softcap=softcaps)
def test_attention(
    name: str, shape: Shape, lengths: list[tuple[int, int]], window: int | None, softcap: float | None
) -> None:
    batch, num_blocks = make_batch(lengths, shape.block_size)
    kv_layer = dirty_pool(shape, num_blocks)
    fill_pool(kv_layer, KvFormat.INTERLEAVED, batch, shape)
    q = torch.randn((len(batch.positions), shape.num_heads, shape.head_dim)).to(shape.dtype)
    arguments = (q, kv_layer, batch, shape.head_dim**-0.5, window, softcap)
    torch.testing.assert_close(BACKENDS[name].attention(*arguments), REFERENCE.attention(*arguments), **shape.tolerance)


@settings(max_examples=60, deadline=None)
@given(
    name=backends,
    shape=shapes,
    lengths=steps,
    qk_norm=st.sampled_from(QkNorm),
    turning=st.sampled_from([1.0, 0.75, 0.25]),
)
def test_rope_and_kv_write(
    name: str, shape: Shape, lengths: list[tuple[int, int]], qk_norm: QkNorm, turning: float
) -> None:
    batch, num_blocks = make_batch(lengths, shape.block_size)
    pools = dirty_pool(shape, num_blocks), dirty_pool(shape, num_blocks)
    heads = shape.num_heads + 2 * shape.num_kv_heads
    qkv = torch.randn((len(batch.positions), heads * shape.head_dim)).to(shape.dtype)
    angles = torch.rand((300, int(shape.head_dim * turning) // 2)) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    norms: list[torch.Tensor | None] = [None, None]
    if qk_norm is not QkNorm.NONE:
        counts = (1, 1) if qk_norm is QkNorm.HEADS else (shape.num_heads, shape.num_kv_heads)
        norms = [torch.rand(count * shape.head_dim).to(shape.dtype) for count in counts]
    got, expected = (
        backend.rope_and_write_kv(qkv, cos_sin, pool, batch, shape.num_heads, shape.num_kv_heads, *norms, 1e-5)
        for backend, pool in zip((BACKENDS[name], REFERENCE), pools, strict=True)
    )
    torch.testing.assert_close(got, expected, **shape.tolerance)
    torch.testing.assert_close(*pools, equal_nan=True, **shape.tolerance)


@settings(max_examples=60, deadline=None)
@given(
    name=backends,
    dtype=dtypes,
    rows=st.integers(0, 20),
    width=st.integers(1, 700),
    add=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rms_norm(name: str, dtype: torch.dtype, rows: int, width: int, add: bool, seed: int) -> None:
    torch.manual_seed(seed)
    x, residual = torch.randn((2, rows, width)).to(dtype)
    weight = torch.rand(width).to(dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 8e-3, "atol": 0}
    if add:
        other = residual.clone()
        got = BACKENDS[name].add_rms_norm(x, residual, weight, 1e-5)
        torch.testing.assert_close(got, REFERENCE.add_rms_norm(x, other, weight, 1e-5), **tolerance)
        torch.testing.assert_close(residual, other, rtol=0, atol=0)
    else:
        got = BACKENDS[name].rms_norm(x, weight, 1e-5)
        torch.testing.assert_close(got, REFERENCE.rms_norm(x, weight, 1e-5), **tolerance)


@settings(max_examples=40, deadline=None)
@given(name=backends, dtype=dtypes, width=st.integers(1, 300), norm=st.booleans(), then_norm=st.booleans())
def test_what_a_part_adds_may_be_normalised_and_multiplied(
    name: str, dtype: torch.dtype, width: int, norm: bool, then_norm: bool
) -> None:
    x, residual = torch.randn((2, 5, width)).to(dtype)
    x_norm, weight = (torch.rand(width).to(dtype) if wanted else None for wanted in (norm, then_norm))
    both = [
        backend.add_rms_norm(x.clone(), residual.clone(), weight, 1e-5, x_norm=x_norm, multiplier=0.22)
        for backend in (BACKENDS[name], REFERENCE)
    ]
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(*both, **tolerance)


@settings(max_examples=40, deadline=None)
@given(name=backends, dtype=dtypes, width=st.integers(1, 300), softcap=st.sampled_from([None, 30.0, 0.5]))
def test_bounds_of_logits(name: str, dtype: torch.dtype, width: int, softcap: float | None) -> None:
    logits = (torch.randn(3, width) * 40).to(dtype)
    both = logits.clone(), logits.clone()
    for backend, values in zip((BACKENDS[name], REFERENCE), both, strict=True):
        backend.bound_logits(values, LogitBounds(0.125, softcap))
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 8e-3, "atol": 1e-3}
    torch.testing.assert_close(*both, **tolerance)


@settings(max_examples=60, deadline=None)
@given(
    name=backends,
    dtype=dtypes,
    rows=st.integers(0, 20),
    width=st.integers(1, 300),
    scale=st.sampled_from([1, 30, 200]),
    activation=st.sampled_from(Activation),
)
def test_gate(name: str, dtype: torch.dtype, rows: int, width: int, scale: int, activation: Activation) -> None:
    gate_up = (torch.randn((rows, 2 * width)) * scale).to(dtype)
    # Where tanh is close to -1, PyTorch's 1 + tanh loses what the product then multiplies.
    tolerance = {"rtol": 1e-5 if dtype is torch.float32 else 8e-3, "atol": 1e-6 * scale * scale}
    got = BACKENDS[name].gate(gate_up, activation)
    torch.testing.assert_close(got, REFERENCE.gate(gate_up, activation), **tolerance)


@settings(max_examples=150, deadline=None)
@given(
    name=backends,
    dtype=dtypes,
    rows=st.integers(0, 70),
    out_features=st.integers(1, 200),
    in_features=st.integers(1, 150),
    bias=st.booleans(),
    threads=st.sampled_from([1, 2]),
)
def test_linear(
    name: str, dtype: torch.dtype, rows: int, out_features: int, in_features: int, bias: bool, threads: int
) -> None:
    weight, x = torch.randn(out_features, in_features).to(dtype), torch.randn(rows, in_features).to(dtype)
    offset = torch.randn(out_features).to(dtype) if bias else None
    exact = x.double() @ weight.double().T + (0 if offset is None else offset.double())
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 8e-3, "atol": 1e-3}
    with num_threads(threads):
        linear = BACKENDS[name].linear(weight, offset)
        torch.testing.assert_close(linear(x), exact.to(dtype), **tolerance)


@settings(max_examples=100, deadline=None)
@given(
    name=backends,
    dtype=dtypes,
    rows=st.integers(0, 90),
    out_features=st.integers(1, 200),
    in_features=st.integers(1, 150),
    bias=st.booleans(),
    threads=st.sampled_from([1, 2]),
)
def test_int8_linear(
    name: str, dtype: torch.dtype, rows: int, out_features: int, in_features: int, bias: bool, threads: int
) -> None:
    weight = quantize_int8(torch.randn(out_features, in_features))
    x = torch.randn(rows, in_features).to(dtype)
    offset = torch.randn(out_features).to(dtype) if bias else None
    expected = REFERENCE.int8_linear(weight, offset, dtype)(x)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 1.6e-2, "atol": 1e-3}
    with num_threads(threads):
        linear = BACKENDS[name].int8_linear(weight, offset, dtype)
        torch.testing.assert_close(linear(x), expected, **tolerance)


@pytest.mark.parametrize("name", BACKENDS)
def test_an_int8_product_of_a_row_does_not_depend_on_how_many_there_are(name: str) -> None:
    x = torch.randn(100, 96).bfloat16()
    linear = BACKENDS[name].int8_linear(quantize_int8(torch.randn(70, 96)), None, torch.bfloat16)
    torch.testing.assert_close(linear(x)[:7], linear(x[:7]), rtol=0, atol=0)


def test_int8_weights_are_within_half_a_step() -> None:
    weight = torch.randn(50, 40)
    weight[3] = 0
    quantized = quantize_int8(weight)
    steps = (quantized.values.float() - weight / quantized.scale[:, None]).abs()
    assert steps.max() <= 0.5 + 1e-4
    assert quantized.values.abs().max() == 127


def test_linear_of_many_rows_and_columns_is_cut_into_bands_and_columns() -> None:
    weight, x = torch.randn(1000, 64), torch.randn(301, 64)
    backend = next(iter(BACKENDS.values()))
    with num_threads(2):
        torch.testing.assert_close(backend.linear(weight, None)(x), x @ weight.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_decode_does_not_depend_on_its_neighbours_or_on_threads(name: str) -> None:
    """The bits of one sequence's answer are the same alone and in a batch, on one thread and on two."""
    shape = Shape(num_kv_heads=2, group=3, head_dim=64, block_size=32, dtype=torch.bfloat16)
    batch, num_blocks = make_batch([(1200, 1), (40, 40), (700, 1), (3, 1)], shape.block_size)
    alone, _ = make_batch([(1200, 1)], shape.block_size, num_blocks)
    alone.block_tables[:] = batch.block_tables[:1]
    kv_layer = dirty_pool(shape, num_blocks)
    fill_pool(kv_layer, KvFormat.INTERLEAVED, batch, shape)
    q = torch.randn((43, shape.num_heads, shape.head_dim)).to(shape.dtype)
    together = BACKENDS[name].attention(q, kv_layer, batch, 0.125, None)
    for threads in (1, 2):
        with num_threads(threads):
            single = BACKENDS[name].attention(q[:1], kv_layer, alone, 0.125, None)
        torch.testing.assert_close(single, together[:1], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("block_tables", -1, "block id -1 of sequence 0"),
        ("block_tables", 7, "block id 7 of sequence 0 is outside 0 to 6"),
        ("context_lens", 49, "context length 49 of sequence 0 is outside 0 to 48"),
        ("context_lens", -3, "context length -3"),
        ("context_lens", 1, "number of new tokens 2 of sequence 0"),
        ("query_start", 1, "query_start"),
    ],
)
def test_an_index_outside_the_pool_is_refused(field: str, value: int, message: str) -> None:
    batch, _ = make_batch([(40, 2)], 16, num_blocks=7)
    getattr(batch, field).flatten()[0] = value
    kv_layer = torch.zeros((7, 2, 1, 16 * 64))
    with pytest.raises(InternalError, match=message):
        next(iter(BACKENDS.values())).attention(torch.zeros(2, 1, 64), kv_layer, batch, 0.1, None)


def test_a_wrong_element_type_or_stride_is_refused() -> None:
    backend = next(iter(BACKENDS.values()))
    with pytest.raises(InternalError, match=r"torch\.float32.*needs 8 contiguous elements of torch\.bfloat16"):
        backend.rms_norm(torch.zeros(1, 8).bfloat16(), torch.ones(8), 1e-5)
    with pytest.raises(InternalError, match=r"strides \(1, 4\)"):
        backend.gate(torch.zeros(8, 4).t(), Activation.SILU)


def test_a_position_without_angles_is_refused() -> None:
    backend = next(iter(BACKENDS.values()))
    batch, num_blocks = make_batch([(40, 1)], 16)
    kv_layer = torch.zeros((num_blocks, 2, 1, 16 * 64))
    with pytest.raises(InternalError, match="40 tokens, angles for 39"):
        backend.rope_and_write_kv(torch.zeros(1, 192), torch.zeros(39, 64), kv_layer, batch, 1, 1, None, None, 1e-5)


def test_a_shape_without_kernel_is_refused() -> None:
    backend = next(iter(BACKENDS.values()))
    batch, num_blocks = make_batch([(5, 1)], 8)
    with pytest.raises(InternalError, match="no native kernel for head dimension 64, block size 8"):
        backend.attention(torch.zeros(1, 1, 64), torch.zeros((num_blocks, 2, 1, 8 * 64)), batch, 0.1, None)


def test_the_kernels_run_on_the_threads_of_pytorch() -> None:
    assert native.share_openmp()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("factor", [1.0, 1 / 3, 2.7e-4, 900.0])
def test_every_float16_is_widened_and_rounded_as_ieee_says(name: str, factor: float) -> None:
    """Subnormal numbers, overflow and NaN among them; the product is float32's."""
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    values = halves.clone()[None]
    BACKENDS[name].bound_logits(values, LogitBounds(factor))
    expected = (halves.float() * torch.tensor(factor, dtype=torch.float32)).half()
    assert torch.equal(values[0].nan_to_num(nan=0.5), expected.nan_to_num(nan=0.5))
    assert torch.equal(values[0].isnan(), expected.isnan())
