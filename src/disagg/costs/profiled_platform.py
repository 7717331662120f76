"""The platform of a profile: its model on its machine, with instances of any number of threads."""

import math
from dataclasses import dataclass, field, replace

from disagg.costs.contention import ServingCost
from disagg.costs.links import InstanceLinks, LinkKind, LinkModel
from disagg.costs.measured_steps import FittedInterference, FittedLatency, fit_interference, fit_latency
from disagg.costs.memory import Scarcity
from disagg.costs.platform import HostCosts, KvWindow
from disagg.costs.profile import Profile
from disagg.costs.serving_fit import fit_serving
from disagg.costs.thread_scaling import estimate_words, latency_at, samples_near


@dataclass(frozen=True)
class ProfiledPlatform:
    """The model and machine of a profile, with KV pools of ``kv_memory_bytes`` for each device of an instance.

    ``interference`` is that of instances of one device each: its mean over the profile, or, where
    ``memory_bytes_per_s`` says what the cores of two instances together read from memory at other times, that of those
    times. Where instances of ``num_threads`` were not measured, it is that of those with the next fewer.
    """

    profile: Profile
    kv_memory_bytes: int
    memory_bytes_per_s: tuple[float, ...] = ()
    num_threads: int | None = None
    """Of each instance.  [default: the fewest that were measured; None where a device computes]"""
    link: LinkModel = field(init=False)
    interference: FittedInterference | None = field(init=False)
    serving: ServingCost | None = field(init=False)

    def __post_init__(self) -> None:
        if self.num_threads is None and self.profile.threads:
            object.__setattr__(self, "num_threads", self.profile.threads[0])
        link = LinkModel(self.profile.link_bytes_per_s, self.profile.link_latency_s, kind=LinkKind.SHM)
        object.__setattr__(self, "link", link)
        object.__setattr__(self, "interference", self._fit_interference())
        object.__setattr__(self, "serving", self._fit_serving())

    @property
    def host(self) -> HostCosts:
        """See ``Platform``."""
        profile = self.profile
        digest_bytes_per_s = profile.digest_bytes_per_s or math.inf
        return HostCosts(profile.accept_s, profile.message_s, profile.deliver_s, self.serving, digest_bytes_per_s)

    @property
    def name(self) -> str:
        """See ``Platform``."""
        return f"{self.profile.model} ({self.profile.dtype}) on {self.profile.device}, profiled"

    @property
    def estimate(self) -> str | None:
        """What of the step times is an estimate, for people; None where all were measured."""
        return None if self.num_threads is None else estimate_words(self.profile, self.num_threads)

    @property
    def kv_bytes_per_token(self) -> int:
        """See ``Platform``."""
        return self.profile.kv_bytes_per_token

    @property
    def kv_window(self) -> KvWindow | None:
        """See ``Platform``."""
        return None

    @property
    def most_tokens(self) -> int:
        """New tokens of the largest step that was measured."""
        return max(sample.shape().num_tokens for steps in self.profile.steps for sample in steps.samples)

    def at_threads(self, num_threads: int | None) -> "ProfiledPlatform":
        """See ``Platform``."""
        if num_threads in (None, self.num_threads) or self.num_threads is None:
            return self
        return ProfiledPlatform(self.profile, self.kv_memory_bytes, self.memory_bytes_per_s, num_threads)

    def latency(
        self, tensor_parallel: int, pipeline_parallel: int, links: InstanceLinks | None = None
    ) -> FittedLatency:
        """See ``Platform``."""
        return latency_at(self.profile, self.num_threads, tensor_parallel, pipeline_parallel)

    def capacity_tokens(self, tensor_parallel: int, pipeline_parallel: int) -> int:
        """See ``Platform``."""
        num_devices = tensor_parallel * pipeline_parallel
        return self.kv_memory_bytes * num_devices // self.profile.kv_bytes_per_token

    def _fit_interference(self) -> FittedInterference | None:
        single = samples_near(self.profile, self.num_threads)
        if single is None:
            return None
        latency, _ = fit_latency(single.samples)
        return fit_interference(single.samples, latency, Scarcity.of(single.memory, self.memory_bytes_per_s))

    def _fit_serving(self) -> ServingCost | None:
        num_cores = self.profile.num_cores
        if num_cores is None or self.num_threads is None:
            return None
        serving = fit_serving(self.profile.served, self.profile.served_requests, num_cores)
        return None if serving is None else replace(serving, spread_s=self.profile.spread_s)
