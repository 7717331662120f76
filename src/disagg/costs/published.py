"""Latency of OPT-13B and OPT-66B on A100 from DistServe's published fits.

The fits cover one pipeline stage count only; as their authors do, pipeline parallelism divides them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

from disagg.base.errors import ConfigurationError
from disagg.base.known_names import known_names
from disagg.costs.latency import StepShape
from disagg.costs.links import InstanceLinks, LinkKind, LinkModel
from disagg.costs.opt_a100_fits import (
    CAPACITY_TOKENS,
    DECODE_FACTOR,
    FITS,
    KV_BYTES_PER_TOKEN,
    LARGE_BATCH,
    PREFILL_FACTOR,
    StepFit,
)
from disagg.costs.platform import OwnDevices

PUBLISHED_MODELS: Final = tuple(dict.fromkeys(model for _, model in FITS))


class EngineHost(NamedTuple):
    """Milliseconds that an engine's host adds to an iteration on its first stage, before the next can begin."""

    step: float = 2.0
    """Whatever it computes; like ``context_token`` from ``simdistserve/base/worker.py``."""
    context_token: float = 1e-4
    """For each token of its context."""
    sequence: float = 0.0
    """For each sequence of which it samples a token."""
    prompt_token: float = 0.0


class EngineChoice(NamedTuple):
    """The factors on the fits before scaling, and the host, with which an engine is imitated."""

    prefill_factor: float
    decode_factor: float
    host: EngineHost


CHOICES: Final = {
    "distserve": EngineChoice(PREFILL_FACTOR["distserve"], DECODE_FACTOR["distserve"], EngineHost()),
    # The runs stream from vllm.entrypoints.api_server --engine-use-ray (2-start-api-server.py, backends.py): after each
    # iteration every sequence's whole output, prompt included, passes through Ray and JSON, which the profiled forward
    # passes do not contain. Both figures are fitted to the run at 1 request/s. The authors' factors, 1.4 and 1.2, stand
    # for the same, but do not grow with the batch.
    "vllm-0.2.3": EngineChoice(1.0, 1.0, EngineHost(sequence=0.6, prompt_token=0.025)),
}
PREFILL_STAGE_MS: Final = 1.0
"""Cost of a prefill on each stage, for each stage there is (``simdistserve/estimators/time_estimator.py``)."""

MIGRATION_BYTES_PER_S: Final = 100e9
"""Chosen on the two measured DistServe runs: a third of NVLink's peak, for copies of one block at a time. At the peak
itself, 300 GB/s, their TPOT comes out 4% to 7% too low, and most so after a hand-over."""
MIGRATION_S: Final = EngineHost().step / 1e3
"""A migration is one remote call to the decode workers: the fits' cost of such a call."""
_MIGRATION: Final = LinkModel(MIGRATION_BYTES_PER_S, overhead_s=MIGRATION_S, kind=LinkKind.NVLINK)


@dataclass(frozen=True)
class PublishedLatency:
    """One instance. The factors multiply the fits as published before scaling."""

    fit: StepFit
    num_stages: int
    prefill_scale: float
    decode_scale: float
    host: EngineHost

    def stage_times_s(self, shape: StepShape) -> tuple[float, ...]:
        """See ``LatencyModel``. A step of both phases pays the larger fixed part once: its weights are read once."""
        work_ms = fixed_ms = stage_ms = 0.0
        if shape.num_prefills:
            fixed, per_token, per_square = self.fit.prefill
            fixed_ms = self.prefill_scale * fixed
            work_ms += self.prefill_scale * (per_token * shape.num_prefill_tokens + per_square * shape.prefill_squares)
            stage_ms = PREFILL_STAGE_MS * self.num_stages
        if shape.num_decodes:
            line = self.fit.decode_small if shape.num_decodes < LARGE_BATCH else self.fit.decode_large
            fixed, per_token, per_sequence = line
            fixed_ms = max(fixed_ms, self.decode_scale * fixed)
            work_ms += self.decode_scale * (per_token * shape.decode_context + per_sequence * shape.num_decodes)
        stage_s = ((work_ms + fixed_ms) / self.num_stages + stage_ms) / 1e3
        host = self.host
        host_ms = host.step + host.context_token * (shape.decode_context + shape.num_prefill_tokens)
        host_ms += host.sequence * shape.num_samples + host.prompt_token * shape.num_prefill_tokens
        return (stage_s + host_ms / 1e3, *(stage_s,) * (self.num_stages - 1))


@dataclass(frozen=True)
class PublishedPlatform(OwnDevices):
    """An OPT model on A100-80GB SXM under one engine (``distserve`` or ``vllm-0.2.3``).

    ``prefill_factor`` and ``decode_factor`` replace those of ``CHOICES`` on the fits before the authors' scaling.
    """

    engine: str
    model: str
    prefill_factor: float | None = None
    decode_factor: float | None = None
    link: LinkModel = _MIGRATION

    def __post_init__(self) -> None:
        if (self.engine, self.model) not in FITS:
            known = known_names(self.model, [model for engine, model in FITS if engine == self.engine])
            raise ConfigurationError(f"there are no published fits for {self.model} under {self.engine}; {known}")

    @property
    def name(self) -> str:
        """See ``Platform``."""
        return f"{self.model} on A100-80GB SXM, published fits of {self.engine}"

    @property
    def kv_bytes_per_token(self) -> int:
        """See ``Platform``."""
        return KV_BYTES_PER_TOKEN[self.model]

    def latency(
        self, tensor_parallel: int, pipeline_parallel: int, links: InstanceLinks | None = None
    ) -> PublishedLatency:
        """See ``Platform``."""
        fits = FITS[self.engine, self.model]
        if tensor_parallel not in fits:
            raise ConfigurationError(
                f"there is no published latency of {self.model} under {self.engine} at tensor parallelism "
                f"{tensor_parallel}; there is for {_listing(fits)}"
            )
        choice = CHOICES[self.engine]
        return PublishedLatency(
            fit=fits[tensor_parallel],
            num_stages=pipeline_parallel,
            prefill_scale=(self.prefill_factor or choice.prefill_factor) / PREFILL_FACTOR[self.engine],
            decode_scale=(self.decode_factor or choice.decode_factor) / DECODE_FACTOR[self.engine],
            host=choice.host,
        )

    def capacity_tokens(self, tensor_parallel: int, pipeline_parallel: int) -> int:
        """See ``Platform``."""
        capacities = CAPACITY_TOKENS[self.model]
        if (tensor_parallel, pipeline_parallel) not in capacities:
            raise ConfigurationError(
                f"there is no published KV capacity of {self.model} at tensor x pipeline parallelism "
                f"{tensor_parallel} x {pipeline_parallel}; there is for "
                + ", ".join(f"{tensor} x {pipeline}" for tensor, pipeline in capacities)
            )
        return capacities[tensor_parallel, pipeline_parallel]


def _listing(values: Iterable[object]) -> str:
    return ", ".join(str(value) for value in values)
