"""From a model's files to a decoder that computes steps: our own, or transformers' code over the paged KV cache."""

import logging
from dataclasses import dataclass
from functools import partial

import torch

from disagg.base.clock import Clock
from disagg.base.config import Device, InstanceSettings
from disagg.base.errors import ConfigurationError
from disagg.engine.facts import Capacity
from disagg.engine.kernels.interface import DecoderWeights, KernelBackend
from disagg.engine.model.decoder import Decoder, StepDecoder
from disagg.engine.model.shared_weights import load_shared
from disagg.engine.model.weights import TORCH_DTYPES, Progress, load_weights, most_weight_bytes
from disagg.models.config import ModelConfig
from disagg.models.foreign import ForeignModel
from disagg.models.locate import ModelFiles

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedDecoder:
    """A decoder, what its weights take, and what computes it, as users are told; see ``Decoder.counts_layers``."""

    decoder: StepDecoder
    weight_bytes: int
    kernels: str
    counts_layers: bool = False


@dataclass(frozen=True, slots=True)
class DecoderLoading:
    """How an instance loads its model. ``progress`` is told the fraction that is loaded."""

    settings: InstanceSettings
    files: ModelFiles
    backend: KernelBackend
    capacity: Capacity
    progress: Progress
    clock: Clock

    def load(self, config: ModelConfig | ForeignModel, device: torch.device) -> LoadedDecoder:
        """Load the weights. Raises ConfigurationError where they are not what ``config`` says."""
        if isinstance(config, ForeignModel):
            return self._load_foreign(config, device)
        model = self.settings.model
        config = config.for_length(model.max_model_len)
        weights = self._load_weights(config, device)
        decoder = Decoder(config, weights, self.backend, self.capacity.max_model_len)
        return LoadedDecoder(decoder, weights.num_bytes, self.backend.name, decoder.counts_layers)

    def _load_foreign(self, config: ForeignModel, device: torch.device) -> LoadedDecoder:
        # An extra: what is imported here is not installed everywhere.
        from disagg.engine.model.transformers_check import check_paged
        from disagg.engine.model.transformers_decoder import TransformersDecoder

        model = self.settings.model
        if model.quantization is not None:
            raise ConfigurationError(
                f"--quantization {model.quantization.value} is for our own decoder; transformers' code computes "
                f"{config.class_name} in {model.dtype.value}"
            )
        _logger.warning(
            "%s is computed by transformers' code with %s attention: the slow path, and the weights are this "
            "instance's own",
            config.class_name,
            self.backend.name,
        )
        self.progress(0.0)
        decoder = TransformersDecoder(
            self.files, config, self.backend, TORCH_DTYPES[model.dtype], device, self.capacity.max_model_len
        )
        check_paged(decoder, self.capacity.layout)
        self.progress(1.0)
        return LoadedDecoder(decoder, decoder.weight_bytes, f"transformers + {self.backend.name}")

    def _load_weights(self, config: ModelConfig, device: torch.device) -> DecoderWeights:
        """Return the model's weights: on a CPU those that the server's instances share, where there are such."""
        settings, model = self.settings, self.settings.model
        load = partial(
            load_weights,
            self.files,
            config,
            self.backend,
            dtype=model.dtype,
            quantization=model.quantization,
            device=device,
            progress=self.progress,
        )
        if settings.weights is None or settings.device is not Device.CPU:
            return load()
        key = f"{self.files.path} {model.dtype} {model.quantization} on {self.backend.name}"
        most_bytes = most_weight_bytes(config)
        return load_shared(settings.weights, key, most_bytes, lambda memory: load(memory=memory), self.clock)
