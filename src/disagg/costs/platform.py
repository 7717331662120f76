"""What the simulator must know of a model on a kind of device: step times, KV size and room, the link between."""

import math
from typing import NamedTuple, Protocol, Self

from disagg.base.window_blocks import WindowBlocks
from disagg.costs.contention import Interference, ServingCost
from disagg.costs.latency import LatencyModel
from disagg.costs.links import InstanceLinks, LinkModel


class HostCosts(NamedTuple):
    """What the host adds to a request, times in seconds: the fields of these names of ``ClusterSpec``."""

    accept_s: float = 0.0
    message_s: float = 0.0
    deliver_s: float = 0.0
    serving: ServingCost | None = None
    digest_bytes_per_s: float = math.inf
    """How fast an instance makes digests of the KV blocks that it offers: of ``InstanceSpec``."""


class KvWindow(NamedTuple):
    """What of a token's keys and values is neither kept nor handed over once a window of ``tokens`` is past it.

    It is in ``num_each`` KV blocks for each that is kept.
    """

    tokens: int
    bytes_per_token: int
    num_each: int = 1

    @property
    def blocks(self) -> WindowBlocks:
        """The blocks that it is in."""
        return WindowBlocks(self.tokens, self.num_each)

    def spared_bytes(self, num_tokens: float) -> float:
        """Return what of a sequence of so many tokens is past the window."""
        return max(0.0, num_tokens - self.tokens + 1) * self.bytes_per_token


class Platform(Protocol):
    """A model on a kind of device, at any parallelism that there are figures for.

    ``latency`` and ``capacity_tokens`` raise ConfigurationError where figures are missing, naming those there are.
    """

    @property
    def name(self) -> str:
        """Model, device and where the figures come from, for people."""

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token, over all layers and devices of an instance."""

    @property
    def kv_window(self) -> KvWindow | None:
        """What sliding layers spare a pool and a hand-over; None where none slides, or the figures do not say."""

    @property
    def link(self) -> LinkModel:
        """The link over which KV blocks travel from one device to another."""

    @property
    def interference(self) -> Interference | None:
        """What computing instances cost their neighbours; None where each has devices of its own, or none was seen."""

    @property
    def host(self) -> HostCosts:
        """What is neither step nor transfer."""

    @property
    def num_threads(self) -> int | None:
        """Threads of an instance; None where it does not compute on cores of a host."""

    def at_threads(self, num_threads: int | None) -> "Platform":
        """Return the same for instances of so many threads; None, or where none compute: this one."""

    def latency(self, tensor_parallel: int, pipeline_parallel: int, links: InstanceLinks | None = None) -> LatencyModel:
        """Return the latency model of an instance, whose devices ``links`` join; None: those of the figures.

        Measured step times hold for the links that they were measured on, whatever is named.
        """

    def capacity_tokens(self, tensor_parallel: int, pipeline_parallel: int) -> int:
        """Return how many tokens the KV pool of an instance holds."""


class OwnDevices:
    """Base of platforms whose instances have devices of their own, and whose figures hold nothing of the host."""

    @property
    def num_threads(self) -> None:
        """See ``Platform``."""
        return None

    def at_threads(self, num_threads: int | None) -> Self:
        """See ``Platform``."""
        return self

    @property
    def kv_window(self) -> KvWindow | None:
        """See ``Platform``."""
        return None

    @property
    def interference(self) -> None:
        """See ``Platform``."""
        return None

    @property
    def host(self) -> HostCosts:
        """See ``Platform``."""
        return HostCosts()
