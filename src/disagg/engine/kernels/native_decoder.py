"""A whole decoder as one call of the native kernels."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from disagg.base.errors import InternalError
from disagg.engine.kernels.interface import DecoderSettings, DecoderWeights, LayerSettings, LayerWeights, StepBatch
from disagg.engine.kernels.native_linear import PackedLinear, address_of, array_address, check_tensor
from disagg.engine.kernels.native_mlp import native_linear, native_mlp

if TYPE_CHECKING:
    from disagg.engine.kernels import _native

    PrepareStep = Callable[[StepBatch, torch.Tensor, int, int], _native.Step]

NO_WINDOW: Final = 2**31 - 1


class NativeDecoder:
    """See ``DecoderStack``. ``native`` has no layers yet; ``prepare_step`` gives a batch in its native form."""

    counts_layers = True

    def __init__(
        self,
        native: "_native.Decoder",
        weights: DecoderWeights,
        settings: DecoderSettings,
        prepare_step: "PrepareStep",
        helpers: "_native.Helpers | None" = None,
    ) -> None:
        self._native = native
        self._weights = weights  # the native side knows addresses only
        self._mlps: list[_native.Mlp] = []
        self._settings = settings
        self._prepare_step = prepare_step
        self._helpers = helpers
        self._last_kv: torch.Tensor | Sequence[torch.Tensor] | None = None
        self._last_pools: tuple[torch.Tensor, list[int]]
        self._head_dim = head_dim_of(weights.layers[0], settings)
        self._vocab_size, self._hidden = weights.embeddings.shape
        self._dtype = weights.embeddings.dtype
        check_tensor(weights.embeddings, self._dtype, self._vocab_size * self._hidden)
        check_tensor(weights.norm, self._dtype, self._hidden)
        for layer, layer_settings in zip(weights.layers, settings.layers, strict=True):
            self._add(layer, layer_settings)

    def __call__(self, kv: torch.Tensor | Sequence[torch.Tensor], batch: StepBatch) -> torch.Tensor:
        """See ``DecoderStack``."""
        settings, token_ids, wanted = self._settings, batch.token_ids, batch.logit_rows
        (rows,), (num_wanted,), best = token_ids.shape, wanted.shape, batch.most_likely
        first, addresses = self._pools(kv)
        steps = [self._prepare_step(one, first, settings.num_heads, self._head_dim) for one in batch.tables]
        check_tensor(token_ids, torch.int64, rows)
        check_tensor(wanted, torch.int64, num_wanted)
        logits = torch.empty((num_wanted, self._vocab_size), dtype=self._dtype)
        try:
            self._native.run(
                steps=[steps[table] for table in batch.layer_tables] or steps * len(addresses),
                token_ids=token_ids.data_ptr(),
                kv_layers=addresses,
                wanted_rows=wanted.data_ptr(),
                num_wanted=num_wanted,
                logits=logits.data_ptr(),
                largest=0 if best is None else array_address(best, np.int64, num_wanted),
                progress=batch.progress,
                num_threads=torch.get_num_threads(),
                helpers=self._helpers,
            )
        except (IndexError, ValueError) as error:
            raise InternalError(f"step refused: {error}") from error
        return logits

    def _pools(self, kv: torch.Tensor | Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[int]]:
        """Return the first layer's pool, and where each layer's is; all must be alike."""
        if kv is not self._last_kv:
            for layer in kv:
                check_tensor(layer, self._dtype, kv[0].numel())
            self._last_pools = kv[0], [layer.data_ptr() for layer in kv]
            self._last_kv = kv
        return self._last_pools

    def _add(self, layer: LayerWeights, settings: LayerSettings) -> None:
        self._mlps.append(native_mlp(layer.mlp))
        norms_rows = layer.q_norm is not None and len(layer.q_norm) > self._head_dim
        for norm, width in (
            (layer.attention_norm, self._hidden),
            (layer.attention_output_norm, self._hidden),
            (layer.mlp_norm, self._hidden),
            (layer.mlp_output_norm, self._hidden),
            (layer.q_norm, self._head_dim * (self._settings.num_heads if norms_rows else 1)),
            (layer.k_norm, self._head_dim * (self._settings.num_kv_heads if norms_rows else 1)),
        ):
            if norm is not None:
                check_tensor(norm, self._dtype, width)
        check_tensor(settings.cos_sin, torch.float32, self._settings.layers[0].cos_sin.numel())
        self._native.add(
            attention_norm=address_of(layer.attention_norm),
            qkv=native_linear(layer.qkv),
            q_norm=address_of(layer.q_norm),
            k_norm=address_of(layer.k_norm),
            attention_output=native_linear(layer.attention_output),
            attention_output_norm=address_of(layer.attention_output_norm),
            mlp_norm=address_of(layer.mlp_norm),
            mlp=self._mlps[-1],
            mlp_output_norm=address_of(layer.mlp_output_norm),
            cos_sin=settings.cos_sin.data_ptr(),
            window=NO_WINDOW if settings.sliding_window is None else settings.sliding_window,
        )


def head_dim_of(layer: LayerWeights, settings: DecoderSettings) -> int:
    """Return the head dimension, which the packed projection of queries, keys and values has."""
    if not isinstance(layer.qkv, PackedLinear):
        raise InternalError("a native decoder needs packed weights")
    return layer.qkv.out_features // (settings.num_heads + 2 * settings.num_kv_heads)
