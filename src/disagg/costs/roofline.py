"""Latency from a model's shape and a device's data sheet: each part takes as long as its slower resource.

Per layer: matrix products with weights (operations against weight bytes), attention of prefill (operations) and of
decode (KV bytes), a fixed cost per kernel, and with tensor parallelism two all-reduces. A pipeline stage has its share
of the layers and sends its activations on; the last one computes the logits. Of a mixture of experts a step computes
what its tokens chose and reads what they chose together; layers are taken to be alike. Sliding windows are not counted:
attention is taken to see the whole context.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Final

from disagg.costs.devices import DeviceSheet
from disagg.costs.latency import PredictsRuns, StepShape
from disagg.costs.links import InstanceLinks
from disagg.costs.sheet_platform import SheetPlatform, split_layers
from disagg.models.shape import ModelShape

KERNELS_PER_LAYER: Final = 10
"""Norms, projections, rotation, attention, activation and residuals, as usually fused."""


@dataclass(frozen=True)
class RooflineLatency(PredictsRuns):
    """One instance of ``tensor_parallel`` x ``num_stages`` devices."""

    config: ModelShape
    device: DeviceSheet
    tensor_parallel: int
    num_stages: int
    itemsize: int
    links: InstanceLinks

    def stage_times_s(self, shape: StepShape) -> tuple[float, ...]:
        """See ``LatencyModel``."""
        layer_s = self._layer_s(shape)
        times = [layer_s * layers for layers in self._layers_of_stages]
        for stage, link in enumerate(self.links.stages):
            times[stage] += link.transfer_time_s(shape.num_tokens * self.config.hidden_size * self.itemsize)
        times[-1] += self._logits(shape.num_samples)
        return tuple(times)

    def decode_run_s(self, shape: StepShape, count: int) -> list[float]:
        """See ``PredictsRuns``: the sums of ``stage_times_s``, in their order; what does not change is got once."""
        first, num_decodes, degree = shape.decode_context, shape.num_decodes, self.tensor_parallel
        num_layers, logits_s = self._layers_of_stages[0], self._logits(shape.num_samples)
        products_s, kernels_s = self._layer_products_s(num_decodes), KERNELS_PER_LAYER * self.device.kernel_s
        reduce_s = 2 * self._all_reduce_s(num_decodes) if degree > 1 else 0.0
        kv_bytes, kv_bytes_per_s = self._kv_bytes, self._kv_bytes_per_s
        return [
            (products_s + kv_bytes * context / degree / kv_bytes_per_s + reduce_s + kernels_s) * num_layers + logits_s
            for context in range(first, first + count * num_decodes, num_decodes)
        ]

    def _logits(self, num_samples: int) -> float:
        seconds = self._logits_s.get(num_samples)
        if seconds is None:
            vocabulary = self.config.vocab_size * self.config.hidden_size
            seconds = self._matmul_s(num_samples, vocabulary, vocabulary) if num_samples else 0.0
            self._logits_s[num_samples] = seconds
        return seconds

    @cached_property
    def _layers_of_stages(self) -> list[int]:
        return split_layers(self.config.num_layers, self.num_stages)

    @cached_property
    def _products_s(self) -> dict[int, float]:
        """What a layer's matrix products take, by tokens: as many entries as steps can have tokens."""
        return {}

    @cached_property
    def _logits_s(self) -> dict[int, float]:
        """What the logits take, by samples: as many entries as steps can have sequences."""
        return {}

    @cached_property
    def _kv_bytes(self) -> int:
        """What a decode reads in a layer of each token of its context, on all devices together."""
        return 2 * self.config.kv_size * self.itemsize

    @cached_property
    def _kv_bytes_per_s(self) -> float:
        return self.device.memory_bytes_per_s * self.device.kv_share

    @cached_property
    def _active_per_layer(self) -> float:
        """Weights of a layer that one token passes through."""
        config = self.config
        return (config.num_active_parameters - config.vocab_size * config.hidden_size) / config.num_layers

    def _read_per_layer(self, num_tokens: int) -> float:
        """Return the weights of a layer that a step of so many tokens reads."""
        config = self.config
        if not config.layer_experts:
            return self._active_per_layer
        return (config.num_read_parameters(num_tokens) - config.vocab_size * config.hidden_size) / config.num_layers

    def _layer_s(self, shape: StepShape) -> float:
        num_tokens = shape.num_tokens
        seconds = self._layer_products_s(num_tokens)
        if shape.num_prefill_tokens:
            num_pairs = (shape.prefill_squares + shape.num_prefill_tokens) / 2
            flops_per_s = self.device.flops_per_s * self.device.attention_share
            seconds += 4 * self.config.q_size * num_pairs / self.tensor_parallel / flops_per_s
        seconds += self._kv_bytes * shape.decode_context / self.tensor_parallel / self._kv_bytes_per_s
        if self.tensor_parallel > 1:
            seconds += 2 * self._all_reduce_s(num_tokens)
        return seconds + KERNELS_PER_LAYER * self.device.kernel_s

    def _layer_products_s(self, num_tokens: int) -> float:
        seconds = self._products_s.get(num_tokens)
        if seconds is None:
            seconds = self._matmul_s(num_tokens, self._active_per_layer, self._read_per_layer(num_tokens))
            self._products_s[num_tokens] = seconds
        return seconds

    def _matmul_s(self, num_rows: int, num_weights: float, num_read: float) -> float:
        """Return the time of ``num_rows`` through ``num_weights`` each, for which ``num_read`` weights are read."""
        device = self.device
        compute_s = 2 * num_rows * num_weights / (device.flops_per_s * device.matmul_share)
        memory_s = num_read * self.itemsize / (device.memory_bytes_per_s * device.weights_share)
        return max(compute_s, memory_s) / self.tensor_parallel

    def _all_reduce_s(self, num_tokens: int) -> float:
        """Return the time of a ring: each device sends its part once to reduce and once to gather."""
        num_bytes = num_tokens * self.config.hidden_size * self.itemsize
        num_hops = 2 * (self.tensor_parallel - 1)
        return self.links.tensor.transfer_time_s(num_hops / self.tensor_parallel * num_bytes)


class RooflinePlatform(SheetPlatform):
    """Any model on any device with a data sheet."""

    @property
    def name(self) -> str:
        """See ``Platform``."""
        return f"{self.model} on {self.device.name}, roofline"

    def latency(
        self, tensor_parallel: int, pipeline_parallel: int, links: InstanceLinks | None = None
    ) -> RooflineLatency:
        """See ``SheetPlatform``."""
        links = self.instance_links(tensor_parallel, pipeline_parallel, links)
        return RooflineLatency(self.config, self.device, tensor_parallel, pipeline_parallel, self.itemsize, links)
