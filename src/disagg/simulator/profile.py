"""A profile: measured steps of one model on one machine, and the latency model fitted to them.

The file holds measurements and facts alone; the fit is made when it is read, so that a better fit needs no new
measurement. Features of a step: a constant; the new tokens, in straight pieces between the measured batch sizes (small
batches wait for the weights, large ones for arithmetic); the squares of prefill attention; the number of prefills; the
context that decodes read; the number of decodes; the sampled tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from disagg.base.errors import ConfigurationError
from disagg.simulator.fit import FitError, fit_relative, relative_error
from disagg.simulator.latency import StepShape
from disagg.simulator.links import Link, LinkModel
from disagg.simulator.platform import HostCosts

PROFILE_VERSION: Final = 1
HOLD_OUT_EVERY: Final = 5
"""One sample in five is kept out of the fit whose error is reported."""
_KNOTS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_MIN_SAMPLES: Final = 10


class StepSample(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One measured step: its chunks as (tokens already there, new tokens), and the seconds it took."""

    chunks: Annotated[tuple[tuple[int, int], ...], Meta(min_length=1)]
    time_s: Annotated[float, Meta(gt=0)]

    def shape(self) -> StepShape:
        """Return what of the step counts; every chunk samples."""
        shape = StepShape()
        for start, num_tokens in self.chunks:
            if num_tokens == 1:
                shape.num_decodes += 1
                shape.decode_context += start + 1
                shape.num_samples += 1
            else:
                shape.add_prefill(start, num_tokens)
        return shape


class ParallelSamples(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The steps that were measured at one tensor parallelism."""

    tensor_parallel: Annotated[int, Meta(ge=1)]
    samples: Annotated[tuple[StepSample, ...], Meta(min_length=_MIN_SAMPLES)]


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What ``disagg profile`` measured."""

    version: int = PROFILE_VERSION
    model: str
    device: str
    dtype: str
    num_threads: Annotated[int, Meta(ge=1)] | None = None
    kv_bytes_per_token: Annotated[int, Meta(ge=1)]
    steps: Annotated[tuple[ParallelSamples, ...], Meta(min_length=1)]
    link_bytes_per_s: Annotated[float, Meta(gt=0)]
    link_latency_s: Annotated[float, Meta(ge=0)] = 0.0
    accept_s: Annotated[float, Meta(ge=0)] = 0.0
    """From a request's arrival at the API to its dispatch."""
    message_s: Annotated[float, Meta(ge=0)] = 0.0
    """A message between router and instance."""


@dataclass(frozen=True)
class FittedLatency:
    """Coefficients of the features above, in seconds."""

    knots: tuple[int, ...]
    coefficients: tuple[float, ...]
    num_stages: int = 1

    def stage_times_s(self, shape: StepShape) -> tuple[float, ...]:
        """See ``LatencyModel``: a pipeline divides the measured time, as every stage has its share of the layers."""
        time_s = 0.0
        for feature, coefficient in zip(_features(shape, self.knots), self.coefficients, strict=True):
            time_s += feature * coefficient
        return (time_s / self.num_stages,) * self.num_stages


def _features(shape: StepShape, knots: Sequence[int]) -> list[float]:
    """Return the features; the last piece of the token count goes on without end."""
    num_tokens = shape.num_tokens
    pieces = [max(0, min(num_tokens, end) - start) for start, end in zip(knots, (*knots[1:], num_tokens), strict=True)]
    return [
        1.0,
        *pieces,
        float(shape.prefill_squares),
        float(shape.num_prefills),
        float(shape.decode_context),
        float(shape.num_decodes),
        float(shape.num_samples),
    ]


def fit_latency(samples: Sequence[StepSample]) -> tuple[FittedLatency, FitError]:
    """Return the model fitted to all samples, and the error on held-out ones of a model fitted to the others."""
    shapes = [sample.shape() for sample in samples]
    most_tokens = max(shape.num_tokens for shape in shapes)
    knots = tuple(knot for knot in _KNOTS if knot < most_tokens) or (1,)
    features = np.array([_features(shape, knots) for shape in shapes])
    times = np.array([sample.time_s for sample in samples])
    held_out = np.arange(len(samples)) % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1
    partial = fit_relative(features[~held_out], times[~held_out])
    error = relative_error(features[held_out] @ partial, times[held_out])
    return FittedLatency(knots, _as_tuple(fit_relative(features, times))), error


def _as_tuple(values: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


@dataclass(frozen=True)
class ProfiledPlatform:
    """The model and machine of a profile, with KV pools of ``kv_memory_bytes`` for each device of an instance.

    ``errors`` is the held-out error by tensor parallelism.
    """

    profile: Profile
    kv_memory_bytes: int
    link: LinkModel = field(init=False)
    errors: dict[int, FitError] = field(init=False)
    _latencies: dict[int, FittedLatency] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        fits = {steps.tensor_parallel: fit_latency(steps.samples) for steps in self.profile.steps}
        object.__setattr__(self, "link", Link(self.profile.link_bytes_per_s, self.profile.link_latency_s))
        object.__setattr__(self, "errors", {tensor: error for tensor, (_, error) in fits.items()})
        object.__setattr__(self, "_latencies", {tensor: latency for tensor, (latency, _) in fits.items()})

    @property
    def host(self) -> HostCosts:
        """See ``Platform``."""
        return HostCosts(self.profile.accept_s, self.profile.message_s)

    @property
    def name(self) -> str:
        """See ``Platform``."""
        return f"{self.profile.model} ({self.profile.dtype}) on {self.profile.device}, profiled"

    @property
    def kv_bytes_per_token(self) -> int:
        """See ``Platform``."""
        return self.profile.kv_bytes_per_token

    def latency(self, tensor_parallel: int, pipeline_parallel: int) -> FittedLatency:
        """See ``Platform``."""
        self._check(tensor_parallel)
        fitted = self._latencies[tensor_parallel]
        return FittedLatency(fitted.knots, fitted.coefficients, pipeline_parallel)

    def capacity_tokens(self, tensor_parallel: int, pipeline_parallel: int) -> int:
        """See ``Platform``."""
        num_devices = tensor_parallel * pipeline_parallel
        return self.kv_memory_bytes * num_devices // self.profile.kv_bytes_per_token

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
        profile = msgspec.json.decode(path.read_bytes(), type=Profile)
    except OSError as error:
        raise ConfigurationError(f"cannot read the profile {path}: {error.strerror}") from error
    except msgspec.MsgspecError as error:
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
