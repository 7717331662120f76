"""One decoder for every supported architecture: the configuration says which parts a layer has."""

from collections.abc import Sequence

import torch

from disagg.base.errors import ConfigurationError
from disagg.engine.kernels.interface import KernelBackend, StepBatch
from disagg.engine.model.rope import rope_table
from disagg.engine.model.weights import DecoderWeights, LayerWeights
from disagg.models.config import ModelConfig


class Decoder:
    """A decoder-only transformer over a paged KV pool. Holds weights and tables; keeps nothing between steps.

    ``max_model_len`` is the longest sequence it will be given, in tokens: the size of the rotary table.
    Raises ConfigurationError when that is more than the model was made for.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        backend: KernelBackend,
        max_model_len: int | None = None,
    ) -> None:
        limit = config.max_position_embeddings
        length = limit if max_model_len is None else max_model_len
        if not 1 <= length <= limit:
            raise ConfigurationError(f"max_model_len {length} must be within 1 and the model's own limit, {limit}")
        self.config = config
        self.backend = backend
        self.max_model_len = length
        self._weights = weights
        self._scale = config.head_dim**-0.5
        self._cos_sin = rope_table(config, length).to(self.device)

    @property
    def device(self) -> torch.device:
        """Where the weights are, and where a step's tensors must be."""
        return self._weights.embeddings.device

    @torch.inference_mode()
    def forward(self, batch: StepBatch, kv: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
        """Compute one step: write the new tokens' keys and values into ``kv``, return logits of the wanted rows.

        ``kv[layer]`` is [num_blocks, 2, Hk, block_size * D] in the backend's format and of the weights' element type.
        Returns float32 [len(batch.logit_rows), vocab_size].
        """
        backend, eps = self.backend, self.config.rms_norm_eps
        residual = torch.nn.functional.embedding(batch.token_ids, self._weights.embeddings)
        layers = self._weights.layers
        x = backend.rms_norm(residual, layers[0].attention_norm, eps)
        for index, layer in enumerate(layers):
            if index:
                x = backend.add_rms_norm(x, residual, layer.attention_norm, eps)
            x = self._attention(layer, index, x, kv[index], batch)
            if index == len(layers) - 1:
                # What follows mixes no rows, and only the wanted ones are read.
                x, residual = x[batch.logit_rows], residual[batch.logit_rows]
                if not len(x):
                    return x.new_empty((0, self.config.vocab_size), dtype=torch.float32)
            x = layer.attention_output(x)
            x = backend.add_rms_norm(x, residual, layer.mlp_norm, eps)
            x = layer.down(backend.silu_and_mul(layer.gate_up(x)))
        x = backend.add_rms_norm(x, residual, self._weights.norm, eps)
        return self._weights.head(x).float()

    def _attention(
        self, layer: LayerWeights, index: int, x: torch.Tensor, kv_layer: torch.Tensor, batch: StepBatch
    ) -> torch.Tensor:
        config = self.config
        q = self.backend.rope_and_write_kv(
            layer.qkv(x),
            self._cos_sin,
            kv_layer,
            batch,
            config.num_heads,
            config.num_kv_heads,
            layer.q_norm,
            layer.k_norm,
            config.rms_norm_eps,
        )
        return self.backend.attention(q, kv_layer, batch, self._scale, config.sliding_windows[index])
