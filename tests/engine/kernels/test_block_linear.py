"""Products with weights in the blocks of GGUF files, against the dequantised matrix."""

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import num_threads
from native_kernels import BACKENDS, backends, dtypes

from disagg.engine.kernels.blocks import BlockWeight
from disagg.engine.model.gguf_blocks import BLOCK_FORMATS, read_blocks

SCALE_BYTES = {
    "Q8_0": (0,), "Q4_0": (0,), "Q5_0": (0,), "Q6_K": (208,),
    "Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2),
}  # fmt: skip
"""Where the float16 numbers of a block are."""


def random_blocks(quantization: GGMLQuantizationType, num_rows: int, num_blocks: int, seed: int) -> bytes:
    """Any bytes, but for scales of both signs and ordinary size: ``gguf`` itself cannot quantise K-quants."""
    generator = np.random.default_rng(seed)
    _, num_bytes = GGML_QUANT_SIZES[quantization]
    blocks = generator.integers(0, 256, (num_rows * num_blocks, num_bytes), dtype=np.uint8)
    for at in SCALE_BYTES[quantization.name]:
        scales = generator.normal(scale=0.02, size=len(blocks)).astype(np.float16)
        scales[generator.random(len(blocks)) < 0.1] = np.float16(3e-7)  # subnormal
        blocks[:, at : at + 2] = scales[:, None].view(np.uint8)
    return blocks.tobytes()


@st.composite
def weights(draw: st.DrawFn) -> tuple[BlockWeight, torch.Tensor]:
    """A matrix as it is kept, and as ``gguf`` dequantises it."""
    quantization = draw(st.sampled_from(list(BLOCK_FORMATS)))
    num_rows, num_blocks = draw(st.integers(1, 100)), draw(st.integers(1, 4))
    stored = np.frombuffer(random_blocks(quantization, num_rows, num_blocks, draw(st.integers(0, 2**31))), np.uint8)
    expected = gguf.quants.dequantize(stored.reshape(num_rows, -1), quantization)
    return read_blocks(stored, quantization, num_rows), torch.from_numpy(expected)


@settings(max_examples=100, deadline=None)
@given(weights())
def test_the_elements_are_those_that_gguf_reads(case: tuple[BlockWeight, torch.Tensor]) -> None:
    kept, expected = case
    assert torch.equal(kept.dequantized(), expected)


@settings(max_examples=200, deadline=None)
@given(
    name=backends, dtype=dtypes, case=weights(), num_rows=st.integers(0, 40), has_bias=st.booleans(),
    threads=st.sampled_from([1, 2]),
)  # fmt: skip
def test_a_product_is_that_of_the_dequantised_matrix(
    name: str,
    dtype: torch.dtype,
    case: tuple[BlockWeight, torch.Tensor],
    num_rows: int,
    has_bias: bool,
    threads: int,
) -> None:
    """The integers are exact and sums float32: shorter types round the input and the result alone."""
    kept, elements = case
    torch.manual_seed(0)
    x = torch.randn(num_rows, elements.shape[1]).to(dtype)
    bias = torch.randn(len(elements)) if has_bias else None
    with num_threads(threads):
        got = BACKENDS[name].block_linear(kept, bias, dtype)(x)
    expected = torch.nn.functional.linear(x.double(), elements.double(), None if bias is None else bias.double())
    size = x.double().abs() @ elements.double().abs().T  # what a sum was made of decides its rounding
    rounding = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype] * expected.abs()
    assert got.dtype is dtype
    assert ((got.double() - expected).abs() <= 4e-6 * size + rounding + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantization", [GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_K], ids=lambda q: q.name)
def test_other_rows_and_threads_change_no_bit(quantization: GGMLQuantizationType, dtype: torch.dtype) -> None:
    """Few rows are multiplied as the blocks come, many by a widened panel."""
    stored = np.frombuffer(random_blocks(quantization, 200, 2, 3), np.uint8)
    kept = read_blocks(stored, quantization, 200)
    x = torch.randn(70, kept.values.shape[1]).to(dtype)
    for backend in BACKENDS.values():
        linear = backend.block_linear(kept, None, dtype)
        with num_threads(2):
            many = linear(x)
        assert torch.equal(torch.cat([linear(row[None]) for row in x]), many)


def test_blocks_take_about_the_bytes_of_the_file() -> None:
    for quantization in BLOCK_FORMATS:
        stored = np.frombuffer(random_blocks(quantization, 96, 2, 1), np.uint8)
        kept = read_blocks(stored, quantization, 96)
        for backend in BACKENDS.values():
            packed = backend.block_linear(kept, None, torch.bfloat16).native.packed_bytes()
            # Fifth and sixth bits take a byte's room.
            most = 1.12 if quantization.name[:2] in ("Q4", "Q8") else 1.65
            assert 1 <= packed / len(stored) <= most, quantization
