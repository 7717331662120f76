"""How long KV blocks travel, and in which order transfers share a link."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from disagg.base.errors import ConfigurationError
from disagg.base.ids import InstanceId
from disagg.costs.fit import fit_relative


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


def fit_link(transfers: Sequence[tuple[int, float]]) -> Link:
    """Return the link that explains measured transfers, given as (bytes, seconds), best."""
    sizes = np.array([num_bytes for num_bytes, _ in transfers], dtype=np.float64)
    times = np.array([time_s for _, time_s in transfers])
    latency_s, byte_s = fit_relative(np.stack([np.ones_like(sizes), sizes], axis=1), times)
    # Sizes too much alike tell no slope: then all of the time counts as bandwidth.
    return Link(1 / float(byte_s), float(latency_s)) if byte_s > 0 else Link(float(sizes.sum() / times.sum()))


class SerialLinks:
    """The links between instances. Transfers of the same pair run one after the other, first come first.

    ``model`` is that of one device to one other. Instances of several devices hold a part of the KV on each and send
    the parts side by side, over as many links as the smaller one of the two has devices.
    """

    def __init__(self, model: LinkModel, num_devices: Mapping[InstanceId, int]) -> None:
        self._model = model
        self._num_devices = num_devices
        self._free_at_s: dict[tuple[InstanceId, InstanceId], float] = {}

    def start(self, source: InstanceId, target: InstanceId, num_bytes: int, now: float) -> float:
        """Queue a transfer at ``now`` and return when it ends."""
        pair = (source, target)
        num_links = min(self._num_devices[source], self._num_devices[target])
        time_s = self._model.transfer_time_s(-(-num_bytes // num_links))
        end_s = max(now, self._free_at_s.get(pair, 0.0)) + time_s
        self._free_at_s[pair] = end_s
        return end_s
