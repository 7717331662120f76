"""How long KV blocks travel, and in which order transfers share a link."""

import math
from dataclasses import dataclass
from typing import Protocol

from disagg.base.errors import ConfigurationError
from disagg.base.ids import InstanceId


class LinkModel(Protocol):
    """Predicts the duration of one transfer that has a link for itself."""

    def transfer_time_s(self, num_bytes: int) -> float:
        """Return the seconds from the start of a transfer to its end."""


@dataclass(frozen=True)
class Link:
    """A latency and a bandwidth."""

    bytes_per_s: float = math.inf
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        if not self.bytes_per_s > 0:
            raise ConfigurationError(f"a link of {self.bytes_per_s} bytes/s moves nothing: give a positive bandwidth")
        if not 0 <= self.latency_s < math.inf:
            raise ConfigurationError(f"a link latency of {self.latency_s} s cannot be: give 0 or more seconds")

    def transfer_time_s(self, num_bytes: int) -> float:
        """Return latency plus bytes over bandwidth."""
        return self.latency_s + num_bytes / self.bytes_per_s


class SerialLinks:
    """One link for each pair of instances. Transfers on the same link run one after the other, first come first."""

    def __init__(self, model: LinkModel) -> None:
        self._model = model
        self._free_at_s: dict[tuple[InstanceId, InstanceId], float] = {}

    def start(self, source: InstanceId, target: InstanceId, num_bytes: int, now: float) -> float:
        """Queue a transfer at ``now`` and return when it ends."""
        pair = (source, target)
        end_s = max(now, self._free_at_s.get(pair, 0.0)) + self._model.transfer_time_s(num_bytes)
        self._free_at_s[pair] = end_s
        return end_s
