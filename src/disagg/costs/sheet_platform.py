"""What every platform made from a model's shape and a device's data sheet knows: memory, KV, links, what divides."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Final

from disagg.base.errors import ConfigurationError
from disagg.costs.devices import DeviceSheet
from disagg.costs.latency import LatencyModel
from disagg.costs.links import InstanceLinks, LinkModel
from disagg.costs.platform import KvWindow, OwnDevices
from disagg.models.shape import ModelShape

MEMORY_UTILISATION: Final = 0.95
WORKSPACE_SHARE: Final = 0.01
"""Part of the memory that activations take: both as in DistServe's worker, for comparable capacities."""


@dataclass(frozen=True)
class SheetPlatform(OwnDevices, ABC):
    """A model on devices with a data sheet, and the links of that between devices unless others are named."""

    config: ModelShape
    device: DeviceSheet
    model: str
    itemsize: int = 2

    @property
    @abstractmethod
    def name(self) -> str:
        """See ``Platform``."""

    @abstractmethod
    def latency(self, tensor_parallel: int, pipeline_parallel: int, links: InstanceLinks | None = None) -> LatencyModel:
        """See ``Platform``. Raise ConfigurationError when heads or layers cannot be divided."""

    @property
    def link(self) -> LinkModel:
        """See ``Platform``."""
        return self.device.peer

    @property
    def kv_bytes_per_token(self) -> int:
        """See ``Platform``."""
        return self.config.kv_bytes_per_token(self.itemsize)

    @property
    def kv_window(self) -> KvWindow | None:
        """See ``Platform``."""
        window = self.config.window_blocks
        if window is None:
            return None
        share = 1 - self.config.block_layers / self.config.num_layers
        return KvWindow(window.tokens, round(share * self.kv_bytes_per_token), window.num_each)

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

    def instance_links(
        self, tensor_parallel: int, pipeline_parallel: int, links: InstanceLinks | None
    ) -> InstanceLinks:
        """Return the links inside an instance; raise ConfigurationError when heads or layers cannot be divided."""
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
        return links or InstanceLinks.alike(self.link, pipeline_parallel)


def split_layers(num_layers: int, num_stages: int) -> list[int]:
    """Return the number of layers of each pipeline stage, the larger parts first."""
    share, rest = divmod(num_layers, num_stages)
    return [share + (stage < rest) for stage in range(num_stages)]
