"""Latency from a model's shape and a device's data sheet: each part takes as long as its slower resource.

Per layer: matrix products with weights (operations against weight bytes), attention of prefill (operations) and of
decode (KV bytes), a fixed cost per kernel, and with tensor parallelism two all-reduces. A pipeline stage has its share
of the layers and sends its activations on; the last one computes the logits. Sliding windows are not counted: attention
is taken to see the whole context.
"""

from dataclasses import dataclass
from typing import Final

from disagg.base.errors import ConfigurationError
from disagg.costs.devices import DeviceSheet
from disagg.costs.latency import StepShape
from disagg.costs.links import InstanceLinks, LinkModel
from disagg.costs.platform import HostCosts
from disagg.models.config import ModelConfig

KERNELS_PER_LAYER: Final = 10
"""Norms, projections, rotation, attention, activation and residuals, as usually fused."""
MEMORY_UTILISATION: Final = 0.95
WORKSPACE_SHARE: Final = 0.01
"""Part of the memory that activations take: both as in DistServe's worker, for comparable capacities."""


def split_layers(num_layers: int, num_stages: int) -> list[int]:
    """Return the number of layers of each pipeline stage, the larger parts first."""
    share, rest = divmod(num_layers, num_stages)
    return [share + (stage < rest) for stage in range(num_stages)]


@dataclass(frozen=True)
class RooflineLatency:
    """One instance of ``tensor_parallel`` x ``num_stages`` devices."""

    config: ModelConfig
    device: DeviceSheet
    tensor_parallel: int
    num_stages: int
    itemsize: int
    links: InstanceLinks

    def stage_times_s(self, shape: StepShape) -> tuple[float, ...]:
        """See ``LatencyModel``."""
        layer_s = self._layer_s(shape)
        times = [layer_s * layers for layers in split_layers(self.config.num_layers, self.num_stages)]
        for stage, link in enumerate(self.links.stages):
            times[stage] += link.transfer_time_s(shape.num_tokens * self.config.hidden_size * self.itemsize)
        times[-1] += self._logits_s(shape.num_samples)
        return tuple(times)

    def _layer_s(self, shape: StepShape) -> float:
        config, device = self.config, self.device
        num_weights = config.hidden_size * (2 * config.q_size + 2 * config.kv_size + 3 * config.intermediate_size)
        seconds = self._matmul_s(shape.num_tokens, num_weights)
        num_pairs = (shape.prefill_squares + shape.num_prefill_tokens) / 2
        seconds += 4 * config.q_size * num_pairs / self.tensor_parallel / (device.flops_per_s * device.attention_share)
        kv_bytes = 2 * config.kv_size * self.itemsize * shape.decode_context / self.tensor_parallel
        seconds += kv_bytes / (device.memory_bytes_per_s * device.kv_share)
        if self.tensor_parallel > 1:
            seconds += 2 * self._all_reduce_s(shape.num_tokens)
        return seconds + KERNELS_PER_LAYER * device.kernel_s

    def _logits_s(self, num_samples: int) -> float:
        return self._matmul_s(num_samples, self.config.vocab_size * self.config.hidden_size) if num_samples else 0.0

    def _matmul_s(self, num_rows: int, num_weights: int) -> float:
        device = self.device
        compute_s = 2 * num_rows * num_weights / (device.flops_per_s * device.matmul_share)
        memory_s = num_weights * self.itemsize / (device.memory_bytes_per_s * device.weights_share)
        return max(compute_s, memory_s) / self.tensor_parallel

    def _all_reduce_s(self, num_tokens: int) -> float:
        """Return the time of a ring: each device sends its part once to reduce and once to gather."""
        num_bytes = num_tokens * self.config.hidden_size * self.itemsize
        num_hops = 2 * (self.tensor_parallel - 1)
        return self.links.tensor.transfer_time_s(num_hops / self.tensor_parallel * num_bytes)


@dataclass(frozen=True)
class RooflinePlatform:
    """Any model on a device with a data sheet, and the links of that between devices unless others are named."""

    config: ModelConfig
    device: DeviceSheet
    model: str
    itemsize: int = 2

    @property
    def link(self) -> LinkModel:
        """See ``Platform``."""
        return self.device.peer

    @property
    def interference(self) -> None:
        """See ``Platform``: every instance has devices of its own."""
        return None

    @property
    def host(self) -> HostCosts:
        """See ``Platform``: a data sheet says nothing of it."""
        return HostCosts()

    @property
    def name(self) -> str:
        """See ``Platform``."""
        return f"{self.model} on {self.device.name}, roofline"

    @property
    def kv_bytes_per_token(self) -> int:
        """See ``Platform``."""
        return self.config.kv_bytes_per_token(self.itemsize)

    def latency(
        self, tensor_parallel: int, pipeline_parallel: int, links: InstanceLinks | None = None
    ) -> RooflineLatency:
        """See ``Platform``. Raise ConfigurationError when heads or layers cannot be divided."""
        if self.config.num_heads % tensor_parallel:
            raise ConfigurationError(
                f"{self.config.num_heads} attention heads of {self.model} do not divide by tensor parallelism "
                f"{tensor_parallel}"
            )
        if pipeline_parallel > self.config.num_layers:
            raise ConfigurationError(
                f"{self.model} has {self.config.num_layers} layers, too few for pipeline parallelism "
                f"{pipeline_parallel}"
            )
        links = links or InstanceLinks.alike(self.link, pipeline_parallel)
        return RooflineLatency(self.config, self.device, tensor_parallel, pipeline_parallel, self.itemsize, links)

    def capacity_tokens(self, tensor_parallel: int, pipeline_parallel: int) -> int:
        """See ``Platform``: what the weights and a reserve leave of the devices' memory."""
        num_devices = tensor_parallel * pipeline_parallel
        usable = self.device.memory_bytes * (MEMORY_UTILISATION - WORKSPACE_SHARE) * num_devices
        left = usable - self.config.num_parameters * self.itemsize
        if left < self.kv_bytes_per_token:
            raise ConfigurationError(
                f"the weights of {self.model} ({self.config.num_parameters * self.itemsize / 1e9:.1f} GB) leave no "
                f"room for KV on {num_devices} x {self.device.name}: use more devices per instance"
            )
        return int(left // self.kv_bytes_per_token)
