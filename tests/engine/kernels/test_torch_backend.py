"""The PyTorch backend against the operations' definitions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import Shape, dense_attention, dirty_pool, fill_pool, make_batch, shapes, softcaps, steps, windows

from disagg.base.errors import InternalError
from disagg.cache.layout import KvFormat
from disagg.engine.kernels.kv_format import gather_kv
from disagg.engine.kernels.torch_backend import TorchBackend
from disagg.models.config import Activation

formats = st.sampled_from(KvFormat)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, lengths=steps, window=windows, softcap=softcaps, kv_format=formats)
def test_attention_equals_its_definition(
    shape: Shape, lengths: list[tuple[int, int]], window: int | None, softcap: float | None, kv_format: KvFormat
) -> None:
    batch, num_blocks = make_batch(lengths, shape.block_size)
    kv_layer = dirty_pool(shape, num_blocks)
    written = fill_pool(kv_layer, kv_format, batch, shape)
    q = torch.randn((len(batch.positions), shape.num_heads, shape.head_dim)).to(shape.dtype)
    scale = shape.head_dim**-0.5
    got = TorchBackend(kv_format).attention(q, kv_layer, batch, scale, window, softcap)
    torch.testing.assert_close(got, dense_attention(q, written, batch, scale, window, softcap), **shape.tolerance)


@settings(max_examples=40, deadline=None)
@given(shape=shapes, context=st.integers(1, 200), kv_format=formats)
def test_what_is_written_can_be_gathered(shape: Shape, context: int, kv_format: KvFormat) -> None:
    batch, num_blocks = make_batch([(context, 1)], shape.block_size)
    kv_layer = dirty_pool(shape, num_blocks)
    [(k, v)] = fill_pool(kv_layer, kv_format, batch, shape)
    gathered = gather_kv(kv_layer, kv_format, batch.block_tables[0], shape.head_dim)
    for expected, got in zip((k, v), gathered, strict=True):
        torch.testing.assert_close(got[:, :context], expected.transpose(0, 1), rtol=0, atol=0)


def test_interleaved_order_is_the_documented_one() -> None:
    shape = Shape(num_kv_heads=1, group=1, head_dim=4, block_size=4, dtype=torch.bfloat16)
    batch, _ = make_batch([(4, 4)], shape.block_size, num_blocks=1)
    kv_layer = dirty_pool(shape, 1)
    [(k, v)] = fill_pool(kv_layer, KvFormat.INTERLEAVED, batch, shape)
    stored_k, stored_v = kv_layer[0, :, 0]
    torch.testing.assert_close(stored_k.view(2, 4, 2), k[:, 0].view(4, 2, 2).transpose(0, 1))
    torch.testing.assert_close(stored_v.view(2, 4, 2), v[:, 0].view(2, 2, 4).transpose(1, 2))


@pytest.mark.parametrize("norm", [False, True])
def test_rope_turns_halves_and_writes_only_the_new_tokens(norm: bool) -> None:
    shape = Shape(num_kv_heads=2, group=3, head_dim=64, block_size=16, dtype=torch.float32)
    batch, num_blocks = make_batch([(40, 7), (3, 3), (17, 1)], shape.block_size)
    kv_layer = dirty_pool(shape, num_blocks)
    qkv = torch.randn((11, (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim))
    angles = torch.rand((64, shape.head_dim // 2)) * 6
    weight = torch.rand(shape.head_dim) if norm else None
    backend = TorchBackend(KvFormat.INTERLEAVED)
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    q = backend.rope_and_write_kv(
        qkv, cos_sin, kv_layer, batch, shape.num_heads, shape.num_kv_heads, weight, weight, 1e-5
    )

    heads = qkv.view(11, -1, shape.head_dim)
    if weight is not None:
        heads = torch.nn.functional.rms_norm(heads, (shape.head_dim,), weight, 1e-5)
    turned = torch.view_as_complex(torch.stack(heads.chunk(2, dim=-1), dim=-1))
    turned = turned * torch.polar(torch.ones_like(angles), angles)[batch.positions.long()].unsqueeze(1)
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    torch.testing.assert_close(q, expected[:, : shape.num_heads])
    written = ~kv_layer.isnan()
    assert written.sum() == 11 * 2 * shape.num_kv_heads * shape.head_dim
    k, v = gather_kv(kv_layer, KvFormat.INTERLEAVED, batch.block_tables[0], shape.head_dim)
    torch.testing.assert_close(k[:, 33:40].transpose(0, 1), expected[:7, shape.num_heads : -shape.num_kv_heads])
    torch.testing.assert_close(v[:, 33:40].transpose(0, 1), qkv.view(11, -1, shape.head_dim)[:7, -2:])


def test_norms_and_activation_round_once() -> None:
    backend = TorchBackend(KvFormat.INTERLEAVED)
    x, residual = torch.randn((2, 5, 96)).bfloat16()
    weight = torch.rand(96).bfloat16()
    total = x + residual
    exact = torch.nn.functional.rms_norm(total.double(), (96,), weight.double(), 1e-5).bfloat16()
    torch.testing.assert_close(backend.add_rms_norm(x, residual, weight, 1e-5), exact, rtol=8e-3, atol=0)
    torch.testing.assert_close(residual, total, rtol=0, atol=0)
    gate, up = x.double().chunk(2, dim=-1)
    silu = (torch.nn.functional.silu(gate) * up).bfloat16()
    torch.testing.assert_close(backend.gate(x, Activation.SILU), silu, rtol=8e-3, atol=0)


@pytest.mark.parametrize("bad_id", [-1, 7])
def test_a_block_id_outside_the_pool_is_refused(bad_id: int) -> None:
    shape = Shape(num_kv_heads=1, group=1, head_dim=64, block_size=16, dtype=torch.float32)
    batch, _ = make_batch([(40, 1)], shape.block_size, num_blocks=7)
    batch.block_tables[0, 1] = bad_id
    with pytest.raises(InternalError, match=f"{bad_id}.*0 to 6"):
        TorchBackend(KvFormat.INTERLEAVED).attention(torch.zeros(1, 1, 64), dirty_pool(shape, 7), batch, 0.1, None)
