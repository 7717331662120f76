"""A decoder out of a backend's single operations: its definition, and how most backends run it."""

from collections.abc import Sequence

import torch

from disagg.engine.kernels.composed_mlp import composed_mlp
from disagg.engine.kernels.interface import (
    DecoderSettings,
    DecoderStack,
    DecoderWeights,
    FusesDecoder,
    KernelBackend,
    StepBatch,
)


def decoder_stack(backend: KernelBackend, weights: DecoderWeights, settings: DecoderSettings) -> DecoderStack:
    """Return the decoder in the form in which ``backend`` runs it fastest."""
    fused = backend.fuse_decoder(weights, settings) if isinstance(backend, FusesDecoder) else None
    return fused or ComposedDecoder(backend, weights, settings)


class ComposedDecoder:
    """See ``DecoderStack``: one call of the backend after the other."""

    counts_layers = False

    def __init__(self, backend: KernelBackend, weights: DecoderWeights, settings: DecoderSettings) -> None:
        self._backend = backend
        self._weights = weights
        self._layers = weights.layers
        self._settings = settings

    def __call__(self, kv: torch.Tensor | Sequence[torch.Tensor], batch: StepBatch) -> torch.Tensor:
        """See ``DecoderStack``."""
        backend, layers, eps = self._backend, self._layers, self._settings.eps
        residual = torch.nn.functional.embedding(batch.token_ids, self._weights.embeddings)
        first = layers[0].attention_norm
        x = residual if first is None else backend.rms_norm(residual, first, eps)
        for index, layer in enumerate(layers):
            if index:
                x = self._join(x, residual, layers[index - 1].mlp_output_norm, layer.attention_norm)
            x = self._attention(index, x, kv[index], batch.of_layer(index))
            if index == len(layers) - 1:
                # What follows mixes no rows, and only the wanted ones are read.
                x, residual = x[batch.logit_rows], residual[batch.logit_rows]
                if not len(x):
                    return x.new_empty((0, len(self._weights.embeddings)))
            x = layer.attention_output(x)
            x = self._join(x, residual, layer.attention_output_norm, layer.mlp_norm)
            x = composed_mlp(backend, x, layer.mlp)
        x = self._join(x, residual, layers[-1].mlp_output_norm, self._weights.norm)
        logits = self._weights.head(x)
        if not self._settings.logits.change_nothing:
            backend.bound_logits(logits, self._settings.logits)
        return logits

    def _join(
        self, x: torch.Tensor, residual: torch.Tensor, x_norm: torch.Tensor | None, norm: torch.Tensor | None
    ) -> torch.Tensor:
        settings = self._settings
        return self._backend.add_rms_norm(
            x, residual, norm, settings.eps, x_norm=x_norm, multiplier=settings.residual_multiplier
        )

    def _attention(self, index: int, x: torch.Tensor, kv_layer: torch.Tensor, batch: StepBatch) -> torch.Tensor:
        layer, settings = self._layers[index], self._settings
        cos_sin, sliding_window = settings.layers[index].cos_sin, settings.layers[index].sliding_window
        q = self._backend.rope_and_write_kv(
            layer.qkv(x),
            cos_sin,
            kv_layer,
            batch,
            settings.num_heads,
            settings.num_kv_heads,
            layer.q_norm,
            layer.k_norm,
            settings.eps,
        )
        return self._backend.attention(q, kv_layer, batch, settings.scale, sliding_window, settings.softcap)
