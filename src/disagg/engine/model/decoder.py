"""One decoder for every supported architecture: the configuration says which parts a layer has."""

from collections.abc import Sequence
from typing import Protocol

import torch

from disagg.base.errors import ConfigurationError
from disagg.engine.kernels.composed_decoder import decoder_stack
from disagg.engine.kernels.interface import (
    DecoderSettings,
    DecoderWeights,
    KernelBackend,
    LayerSettings,
    LogitBounds,
    StepBatch,
)
from disagg.engine.model.rope import rope_tables
from disagg.models.config import ModelConfig
from disagg.models.shape import ModelShape


class StepDecoder(Protocol):
    """Whatever computes steps of a model over a paged KV pool.

    ``max_model_len`` is the longest sequence it will be given, in tokens; ``backend`` gives the pool its format, and
    chooses tokens where it can.
    """

    backend: KernelBackend
    max_model_len: int

    @property
    def config(self) -> ModelShape:
        """What the KV pool is laid out by."""

    def forward(self, batch: StepBatch, kv: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
        """See ``Decoder.forward``."""


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
        config = config.for_length(length)
        self.config = config
        self.backend = backend
        self.max_model_len = length
        self._weights = weights
        settings = DecoderSettings(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            eps=config.rms_norm_eps,
            scale=config.attention_scale,
            softcap=config.attention_softcap,
            residual_multiplier=config.residual_multiplier,
            logits=LogitBounds(config.logit_multiplier, config.logit_softcap),
            layers=self._layer_settings(),
        )
        self._stack = decoder_stack(backend, weights, settings)

    def _layer_settings(self) -> tuple[LayerSettings, ...]:
        tables = rope_tables(self.config, self.max_model_len)
        on_device = {id(table): table.to(self.device) for table in tables}
        return tuple(
            LayerSettings(cos_sin=on_device[id(table)], sliding_window=window)
            for table, window in zip(tables, self.config.sliding_windows, strict=True)
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are, and where a step's tensors must be."""
        return self._weights.embeddings.device

    @property
    def counts_layers(self) -> bool:
        """Whether it counts in ``StepBatch.progress`` the layers whose keys and values are written."""
        return self._stack.counts_layers

    def forward(self, batch: StepBatch, kv: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
        """Compute one step: write the new tokens' keys and values into ``kv``, return logits of the wanted rows.

        ``kv[layer]`` is [num_blocks, 2, Hk, block_size * D] in the backend's format and of the weights' element type.
        Returns [len(batch.logit_rows), vocab_size] in the weights' element type.
        """
        return self._stack(kv, batch)
