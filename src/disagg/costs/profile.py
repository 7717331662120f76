"""The file of a profile: measured steps of one model on one machine.

It holds measurements and facts alone; the fit is made when it is read, so that a better fit needs no new measurement.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from disagg.base.errors import ConfigurationError
from disagg.base.structs import read_struct
from disagg.costs.measured_steps import MAX_STEP_S, StepSample
from disagg.costs.memory import BytesPerSecond, MemorySample
from disagg.costs.serving_fit import ServedRequest, ServedSample

PROFILE_VERSION: Final = 4
_OF_ONE_THREAD_COUNT: Final = 3
"""The version before, whose steps and readings were of one number of threads; it is still read."""
_MIN_SAMPLES: Final = 10
LINUX_SPREAD_S: Final = 0.3
"""What Linux takes to spread what serves over the cores again. ``benchmarks/core_wait.py`` shows it: beside a busy
prefill instance on two cores, a lone decode waits 1.1 to 0.9 ms a step for its core at first, later 0.6."""


class ParallelSamples(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The steps that were measured of instances of one tensor parallelism and number of threads."""

    tensor_parallel: Annotated[int, Meta(ge=1, le=1024)]
    num_threads: Annotated[int, Meta(ge=1, le=1 << 16)] | None = None
    """On cores of the host; None where a device computes."""
    samples: Annotated[tuple[StepSample, ...], Meta(min_length=_MIN_SAMPLES)]
    memory: tuple[MemorySample, ...] = ()
    """What the cores of two such instances read from memory, time and again while neighbours were measured."""

    @property
    def words(self) -> str:
        """What instances these are of, for people."""
        threads = "" if self.num_threads is None else f"{self.num_threads} thread(s), "
        return f"{threads}tensor parallelism {self.tensor_parallel}"


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What ``disagg profile`` measured."""

    version: int = PROFILE_VERSION
    model: str
    device: str
    dtype: str
    kv_bytes_per_token: Annotated[int, Meta(ge=1, le=1 << 40)]
    steps: Annotated[tuple[ParallelSamples, ...], Meta(min_length=1)]
    link_bytes_per_s: BytesPerSecond
    """Of pulls, by an instance that checks what it reads and has nothing else to do."""
    link_latency_s: Annotated[float, Meta(ge=0, le=MAX_STEP_S)] = 0.0
    digest_bytes_per_s: BytesPerSecond | None = None
    """Of the KV blocks that are offered: what an offer takes for each byte beside its messages. None: not measured."""
    accept_s: Annotated[float, Meta(ge=0, le=MAX_STEP_S)] = 0.0
    """From a request's arrival at the API to its dispatch."""
    message_s: Annotated[float, Meta(ge=0, le=MAX_STEP_S)] = 0.0
    """A message between router and instance."""
    deliver_s: Annotated[float, Meta(ge=0, le=MAX_STEP_S)] = 0.0
    """From a token at the instance to its arrival at a client of this machine."""
    temperature: Annotated[float, Meta(ge=0, le=1e9)] = 0.0
    """That of the sampled tokens: above 0, each costs two more passes over the vocabulary."""
    num_cores: Annotated[int, Meta(ge=1, le=1 << 16)] | None = None
    """Cores that the server could use; its instances computed on some of them or on all."""
    served: tuple[ServedSample, ...] = ()
    """What serving cost while a server streamed to clients of the same machine."""
    served_requests: tuple[ServedRequest, ...] = ()
    """What requests of several lengths cost that server and the client."""
    spread_s: Annotated[float, Meta(ge=0)] = LINUX_SPREAD_S
    """From an instance's begin to compute until the operating system has moved what served on its core."""

    @property
    def threads(self) -> tuple[int, ...]:
        """Numbers of threads at which instances of one device were measured, the fewest first."""
        measured = {one.num_threads for one in self.steps if one.tensor_parallel == 1}
        return tuple(sorted(number for number in measured if number is not None))


def load_profile(path: Path) -> Profile:
    """Read a profile; raise ConfigurationError when it is none, or of a version that is not read."""
    try:
        profile = read_struct(_as_this_version(msgspec.json.decode(path.read_bytes())), Profile)
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


def _as_this_version(fields: Any) -> Any:
    """Return the fields of a profile of one number of threads as they are now; others as they are."""
    if not isinstance(fields, Mapping) or fields.get("version") != _OF_ONE_THREAD_COUNT:
        return fields
    own = {"num_threads": fields.get("num_threads"), "memory": fields.get("memory", ())}
    others = {name: value for name, value in fields.items() if name not in own}
    steps = fields.get("steps")
    if isinstance(steps, list):
        others["steps"] = [{**one, **own} if isinstance(one, dict) else one for one in steps]
    return {**others, "version": PROFILE_VERSION}
