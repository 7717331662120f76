"""A profile: measured steps of one model on one machine, and the platform made of it.

The file holds measurements and facts alone; the fit is made when it is read, so that a better fit needs no new
measurement.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from disagg.base.errors import ConfigurationError
from disagg.base.structs import read_struct
from disagg.costs.contention import ServingCost
from disagg.costs.fit import FitError
from disagg.costs.links import InstanceLinks, LinkKind, LinkModel
from disagg.costs.measured_steps import (
    MAX_STEP_S,
    FittedInterference,
    FittedLatency,
    StepSample,
    fit_interference,
    fit_latency,
)
from disagg.costs.memory import BytesPerSecond, MemorySample, Scarcity
from disagg.costs.platform import HostCosts, KvWindow
from disagg.costs.serving_fit import ServedRequest, ServedSample, fit_serving

PROFILE_VERSION: Final = 3
_MIN_SAMPLES: Final = 10
LINUX_SPREAD_S: Final = 0.3
"""What Linux takes to spread what serves over the cores again. ``benchmarks/core_wait.py`` shows it: beside a busy
prefill instance on two cores, a lone decode waits 1.1 to 0.9 ms a step for its core at first, later 0.6."""


class ParallelSamples(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The steps that were measured at one tensor parallelism."""

    tensor_parallel: Annotated[int, Meta(ge=1, le=1024)]
    samples: Annotated[tuple[StepSample, ...], Meta(min_length=_MIN_SAMPLES)]


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What ``disagg profile`` measured."""

    version: int = PROFILE_VERSION
    model: str
    device: str
    dtype: str
    num_threads: Annotated[int, Meta(ge=1, le=1 << 16)] | None = None
    kv_bytes_per_token: Annotated[int, Meta(ge=1, le=1 << 40)]
    steps: Annotated[tuple[ParallelSamples, ...], Meta(min_length=1)]
    link_bytes_per_s: BytesPerSecond
    link_latency_s: Annotated[float, Meta(ge=0, le=MAX_STEP_S)] = 0.0
    accept_s: Annotated[float, Meta(ge=0, le=MAX_STEP_S)] = 0.0
    """From a request's arrival at the API to its dispatch."""
    message_s: Annotated[float, Meta(ge=0, le=MAX_STEP_S)] = 0.0
    """A message between router and instance."""
    deliver_s: Annotated[float, Meta(ge=0, le=MAX_STEP_S)] = 0.0
    """From a token at the instance to its arrival at a client of this machine."""
    temperature: Annotated[float, Meta(ge=0, le=1e9)] = 0.0
    """That of the sampled tokens: above 0, each costs two more passes over the vocabulary."""
    num_cores: Annotated[int, Meta(ge=1, le=1 << 16)] | None = None
    """Cores that the server could use; its instances computed on some of them or on all, ``num_threads`` each."""
    served: tuple[ServedSample, ...] = ()
    """What serving cost while a server streamed to clients of the same machine."""
    memory: tuple[MemorySample, ...] = ()
    """What the cores of two instances read from memory, time and again while neighbours were measured."""
    served_requests: tuple[ServedRequest, ...] = ()
    """What requests of several lengths cost that server and the client."""
    spread_s: Annotated[float, Meta(ge=0)] = LINUX_SPREAD_S
    """From an instance's begin to compute until the operating system has moved what served on its core."""


@dataclass(frozen=True)
class ProfiledPlatform:
    """The model and machine of a profile, with KV pools of ``kv_memory_bytes`` for each device of an instance.

    ``errors`` is the held-out error by tensor parallelism. ``interference`` is that of instances of one device each:
    its mean over the profile, or, where ``memory_bytes_per_s`` says what the cores of two instances together read from
    memory at other times, that of those times.
    """

    profile: Profile
    kv_memory_bytes: int
    memory_bytes_per_s: tuple[float, ...] = ()
    link: LinkModel = field(init=False)
    errors: dict[int, FitError] = field(init=False)
    interference: FittedInterference | None = field(init=False)
    serving: ServingCost | None = field(init=False)
    _latencies: dict[int, FittedLatency] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        fits = {steps.tensor_parallel: fit_latency(steps.samples) for steps in self.profile.steps}
        link = LinkModel(self.profile.link_bytes_per_s, self.profile.link_latency_s, kind=LinkKind.SHM)
        object.__setattr__(self, "link", link)
        object.__setattr__(self, "errors", {tensor: error for tensor, (_, error) in fits.items()})
        object.__setattr__(self, "_latencies", {tensor: latency for tensor, (latency, _) in fits.items()})
        single = next((steps.samples for steps in self.profile.steps if steps.tensor_parallel == 1), None)
        scarcity = Scarcity.of(self.profile.memory, self.memory_bytes_per_s)
        interference = None if single is None else fit_interference(single, self._latencies[1], scarcity)
        object.__setattr__(self, "interference", interference)
        object.__setattr__(self, "serving", self._fit_serving())

    @property
    def host(self) -> HostCosts:
        """See ``Platform``."""
        return HostCosts(self.profile.accept_s, self.profile.message_s, self.profile.deliver_s, self.serving)

    @property
    def name(self) -> str:
        """See ``Platform``."""
        return f"{self.profile.model} ({self.profile.dtype}) on {self.profile.device}, profiled"

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

    def latency(
        self, tensor_parallel: int, pipeline_parallel: int, links: InstanceLinks | None = None
    ) -> FittedLatency:
        """See ``Platform``."""
        self._check(tensor_parallel)
        fitted = self._latencies[tensor_parallel]
        return FittedLatency(fitted.knots, fitted.coefficients, pipeline_parallel)

    def capacity_tokens(self, tensor_parallel: int, pipeline_parallel: int) -> int:
        """See ``Platform``."""
        num_devices = tensor_parallel * pipeline_parallel
        return self.kv_memory_bytes * num_devices // self.profile.kv_bytes_per_token

    def _fit_serving(self) -> ServingCost | None:
        num_cores, num_threads = self.profile.num_cores, self.profile.num_threads
        if num_cores is None or num_threads is None:
            return None
        serving = fit_serving(self.profile.served, self.profile.served_requests, num_cores, num_threads)
        return None if serving is None else replace(serving, spread_s=self.profile.spread_s)

    def _check(self, tensor_parallel: int) -> None:
        if tensor_parallel not in self._latencies:
            measured = ", ".join(str(tensor) for tensor in self._latencies)
            raise ConfigurationError(
                f"the profile of {self.profile.model} has no steps at tensor parallelism {tensor_parallel}, only at "
                f"{measured}: profile it, or change the placement"
            )


def load_profile(path: Path) -> Profile:
    """Read a profile; raise ConfigurationError when it is none, or of another version."""
    try:
        profile = read_struct(msgspec.json.decode(path.read_bytes()), Profile)
    except OSError as error:
        raise ConfigurationError(f"cannot read the profile {path}: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ConfigurationError) as error:
        raise ConfigurationError(f"{path} is no profile: {error}; make one with disagg profile") from error
    if profile.version != PROFILE_VERSION:
        raise ConfigurationError(
            f"{path} is a profile of version {profile.version}, this is version {PROFILE_VERSION}: make a new one"
        )
    return profile


def save_profile(profile: Profile, path: Path) -> None:
    """Write a profile; raise ConfigurationError when the file cannot be written."""
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=1) + b"\n")
    except OSError as error:
        raise ConfigurationError(f"cannot write the profile {path}: {error.strerror}") from error
