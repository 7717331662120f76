"""A profile's step times on other numbers of threads than it was made with: an estimate, where nobody measured.

A step is arithmetic, which cores share evenly, or waits for memory, which they read together as fast as the profile
saw two instances read it. The slower of the two is taken for the whole step.
"""

from dataclasses import dataclass, replace
from statistics import median
from typing import Final

from disagg.costs.contention import ServingCost
from disagg.costs.latency import LatencyModel, StepShape
from disagg.costs.links import InstanceLinks, LinkModel
from disagg.costs.platform import HostCosts, KvWindow
from disagg.costs.profile import ProfiledPlatform

_EFFICIENCY: Final = 0.95
"""Of threads that share a step: what waits for the slowest is lost. 0.95 on two cores (docs/engine.md)."""


@dataclass(frozen=True)
class ScaledLatency:
    """Step times of ``measured``, each ``factor`` as long."""

    measured: LatencyModel
    factor: float

    @property
    def num_stages(self) -> int:
        """See ``LatencyModel``."""
        return self.measured.num_stages

    def stage_times_s(self, shape: StepShape) -> tuple[float, ...]:
        """See ``LatencyModel``."""
        return tuple(time_s * self.factor for time_s in self.measured.stage_times_s(shape))


@dataclass(frozen=True)
class ThreadScaledPlatform:
    """The model and machine of a profile with ``num_threads`` for each instance. See ``Platform``.

    What neighbours cost one another is not known for it.
    """

    profiled: ProfiledPlatform
    num_threads: int

    @property
    def factor(self) -> float:
        """Step time over that of the profile."""
        wider = self.num_threads / (self.profiled.profile.num_threads or 1)
        memory = self.profiled.profile.memory
        # Two instances read ``together``; more cores than theirs are taken to read no more.
        read = median(one.alone / one.together for one in memory) if memory else 0.0
        return max(1 / wider, min(read, 1.0) if wider > 1 else 1 / wider) / _EFFICIENCY

    @property
    def link(self) -> LinkModel:
        """See ``Platform``."""
        return self.profiled.link

    @property
    def interference(self) -> None:
        """See ``Platform``."""
        return None

    @property
    def host(self) -> HostCosts:
        """See ``Platform``: serving costs what it did, beside instances of more cores."""
        host, serving = self.profiled.host, self.profiled.serving
        if serving is None:
            return host
        wider: ServingCost = replace(serving, cores_per_instance=self.num_threads)
        return host._replace(serving=wider)

    @property
    def name(self) -> str:
        """See ``Platform``."""
        return f"{self.profiled.name}, scaled to {self.num_threads} threads"

    @property
    def kv_bytes_per_token(self) -> int:
        """See ``Platform``."""
        return self.profiled.kv_bytes_per_token

    @property
    def kv_window(self) -> KvWindow | None:
        """See ``Platform``."""
        return self.profiled.kv_window

    def latency(
        self, tensor_parallel: int, pipeline_parallel: int, links: InstanceLinks | None = None
    ) -> ScaledLatency:
        """See ``Platform``."""
        return ScaledLatency(self.profiled.latency(tensor_parallel, pipeline_parallel, links), self.factor)

    def capacity_tokens(self, tensor_parallel: int, pipeline_parallel: int) -> int:
        """See ``Platform``."""
        return self.profiled.capacity_tokens(tensor_parallel, pipeline_parallel)
