"""The layers of a decoder out of a backend's single operations: their definition, and how most backends run them."""

from collections.abc import Sequence

import torch

from disagg.engine.kernels.interface import (
    DecoderLayers,
    FusesLayers,
    KernelBackend,
    LayerSettings,
    LayerWeights,
    StepBatch,
)


def decoder_layers(backend: KernelBackend, layers: Sequence[LayerWeights], settings: LayerSettings) -> DecoderLayers:
    """Return the layers in the form in which ``backend`` runs them fastest."""
    fused = backend.fuse_layers(layers, settings) if isinstance(backend, FusesLayers) else None
    return fused or ComposedLayers(backend, layers, settings)


class ComposedLayers:
    """See ``DecoderLayers``: one call of the backend after the other."""

    def __init__(self, backend: KernelBackend, layers: Sequence[LayerWeights], settings: LayerSettings) -> None:
        self._backend = backend
        self._layers = tuple(layers)
        self._settings = settings

    def __call__(
        self, residual: torch.Tensor, kv: torch.Tensor | Sequence[torch.Tensor], batch: StepBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``DecoderLayers``."""
        backend, layers, eps = self._backend, self._layers, self._settings.eps
        x = backend.rms_norm(residual, layers[0].attention_norm, eps)
        for index, layer in enumerate(layers):
            if index:
                x = backend.add_rms_norm(x, residual, layer.attention_norm, eps)
            x = self._attention(index, x, kv[index], batch)
            if index == len(layers) - 1:
                # What follows mixes no rows, and only the wanted ones are read.
                x, residual = x[batch.logit_rows], residual[batch.logit_rows]
                if not len(x):
                    return torch.empty_like(residual), residual
            x = layer.attention_output(x)
            x = backend.add_rms_norm(x, residual, layer.mlp_norm, eps)
            x = layer.down(backend.silu_and_mul(layer.gate_up(x)))
        return x, residual

    def _attention(self, index: int, x: torch.Tensor, kv_layer: torch.Tensor, batch: StepBatch) -> torch.Tensor:
        layer, settings = self._layers[index], self._settings
        q = self._backend.rope_and_write_kv(
            layer.qkv(x),
            settings.cos_sin,
            kv_layer,
            batch,
            settings.num_heads,
            settings.num_kv_heads,
            layer.q_norm,
            layer.k_norm,
            settings.eps,
        )
        return self._backend.attention(q, kv_layer, batch, settings.scale, settings.sliding_windows[index])
