"""Measured steps, and the latency model fitted to them.

Features of a step: a constant; the new tokens, in straight pieces between the sizes below (small batches wait for the
weights, large ones for arithmetic); the squares of prefill attention; the number of prefills; the context that decodes
read; the number of decodes; the sampled tokens. What a computing neighbour adds: a constant, a part for each new token
and one for each token of decode context, by what the neighbour computes and by how scarce memory bandwidth is.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Final

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from disagg.costs.contention import Activity
from disagg.costs.fit import FitError, fit_relative, relative_error
from disagg.costs.latency import StepShape
from disagg.costs.memory import BytesPerSecond, Scarcity

HOLD_OUT_EVERY: Final = 5
"""One sample in five is kept out of the fit whose error is reported."""
_KNOTS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_MIN_SAMPLES_BESIDE: Final = 5


MAX_STEP_S: Final = 3600.0
MAX_CHUNK: Final = 1 << 24
Chunks = Annotated[
    tuple[tuple[Annotated[int, Meta(ge=0, le=MAX_CHUNK)], Annotated[int, Meta(ge=1, le=MAX_CHUNK)]], ...],
    Meta(min_length=1),
]
"""Those of a measured step, as (tokens already there, new tokens)."""


def shape_of(chunks: Chunks) -> StepShape:
    """Return what of a measured step counts; every chunk samples."""
    shape = StepShape()
    for start, num_tokens in chunks:
        if num_tokens == 1:
            shape.num_decodes += 1
            shape.decode_context += start + 1
            shape.num_samples += 1
        else:
            shape.add_prefill(start, num_tokens)
    return shape


class StepSample(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One measured step and the seconds it took.

    ``neighbour`` is what another instance of the host computed meanwhile, without end, and ``memory_bytes_per_s`` what
    the cores of both could read from memory at that time.
    """

    chunks: Chunks
    time_s: Annotated[float, Meta(gt=0, le=MAX_STEP_S)]
    neighbour: Activity | None = None
    memory_bytes_per_s: BytesPerSecond | None = None

    def shape(self) -> StepShape:
        """Return what of the step counts."""
        return shape_of(self.chunks)


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


@dataclass(frozen=True)
class FittedInterference:
    """Seconds that a neighbour adds to a step, to each new token of it, and to each token of its decode context."""

    coefficients: Mapping[Activity, tuple[float, float, float]]

    def added_s(self, neighbour: Activity, shape: StepShape) -> float:
        """See ``Interference``; nothing for a neighbour that was not measured."""
        added = self.coefficients.get(neighbour)
        if added is None:
            return 0.0
        return added[0] + added[1] * shape.num_tokens + added[2] * shape.decode_context


@dataclass(frozen=True)
class HeldOut:
    """A sample that was kept out of the fit, and what the fit to the others says of it."""

    sample: StepSample
    predicted_s: float

    @property
    def relative_error(self) -> float:
        """Prediction over measurement, less 1."""
        return self.predicted_s / self.sample.time_s - 1


def fit_latency(samples: Sequence[StepSample]) -> tuple[FittedLatency, FitError]:
    """Return the model fitted to all samples, and the error on held-out ones of a model fitted to the others.

    Samples beside a neighbour are left out.
    """
    alone = [sample for sample in samples if sample.neighbour is None]
    held_out = hold_out(alone)
    predicted = np.array([one.predicted_s for one in held_out])
    return _fit(alone), relative_error(predicted, np.array([one.sample.time_s for one in held_out]))


def hold_out(samples: Sequence[StepSample]) -> list[HeldOut]:
    """Fit to four samples in five, and return what that says of the others."""
    alone = [sample for sample in samples if sample.neighbour is None]
    kept_out = alone[HOLD_OUT_EVERY - 1 :: HOLD_OUT_EVERY]
    latency = _fit([sample for index, sample in enumerate(alone) if index % HOLD_OUT_EVERY != HOLD_OUT_EVERY - 1])
    return [HeldOut(sample, latency.stage_times_s(sample.shape())[0]) for sample in kept_out]


@dataclass(frozen=True)
class _Added:
    """What a neighbour adds: a constant, and by scarcity a part for a step, a new token, a token of decode context."""

    constant: float
    step: float
    token: float
    context: float

    def where(self, scarcity: float) -> tuple[float, float, float]:
        """Return what is added to a step, a new token, a token of decode context."""
        return self.constant + self.step * scarcity, self.token * scarcity, self.context * scarcity


def fit_interference(
    samples: Sequence[StepSample], alone: FittedLatency, scarcity: Scarcity | None = None
) -> FittedInterference:
    """Return what neighbours add to the steps of the model ``alone``; never less than nothing.

    With ``scarcity``, what a neighbour adds grows with it, from sample to sample, and is told for the usual one.
    """
    usual = 1.0 if scarcity is None else scarcity.usual
    added = {activity: _fit_added(beside, alone, scarcity) for activity, beside in _by_activity(samples)}
    return FittedInterference({activity: one.where(usual) for activity, one in added.items()})


def interference_errors(
    samples: Sequence[StepSample], alone: FittedLatency, scarcity: Scarcity | None = None
) -> dict[Activity, FitError]:
    """Return how far what was fitted is from the samples beside each kind of neighbour, at the scarcity of each."""
    errors = {}
    for activity, beside in _by_activity(samples):
        added = _fit_added(beside, alone, scarcity)
        predicted = [
            FittedInterference({activity: added.where(_met(sample, scarcity))}).added_s(activity, sample.shape())
            + alone.stage_times_s(sample.shape())[0]
            for sample in beside
        ]
        errors[activity] = relative_error(np.array(predicted), np.array([sample.time_s for sample in beside]))
    return errors


def _by_activity(samples: Sequence[StepSample]) -> Iterator[tuple[Activity, list[StepSample]]]:
    """Yield each kind of neighbour of which there are enough samples."""
    for activity in Activity:
        beside = [sample for sample in samples if sample.neighbour is activity]
        if len(beside) >= _MIN_SAMPLES_BESIDE:
            yield activity, beside


def _met(sample: StepSample, scarcity: Scarcity | None) -> float:
    """Return the scarcity that a sample met: the usual one where nothing was read beside it, 1 without any."""
    if scarcity is None:
        return 1.0
    return scarcity.usual if sample.memory_bytes_per_s is None else scarcity.where(sample.memory_bytes_per_s)


def _fit_added(beside: Sequence[StepSample], alone: FittedLatency, scarcity: Scarcity | None) -> _Added:
    shapes = [sample.shape() for sample in beside]
    met = np.array([[_met(sample, scarcity)] for sample in beside])
    growing = met * np.array([[1.0, shape.num_tokens, shape.decode_context] for shape in shapes])
    constant = np.full((len(beside), 1), 0.0 if scarcity is None else 1.0)
    times = np.array([sample.time_s for sample in beside])
    added = times - np.array([alone.stage_times_s(shape)[0] for shape in shapes])
    # As parts of the whole step, so that a millisecond counts more in a short one.
    return _Added(*map(float, fit_relative(np.hstack([constant, growing]), added, times)))


def _fit(samples: Sequence[StepSample]) -> FittedLatency:
    shapes = [sample.shape() for sample in samples]
    most_tokens = max(shape.num_tokens for shape in shapes)
    knots = tuple(knot for knot in _KNOTS if knot < most_tokens) or (1,)
    features = np.array([_features(shape, knots) for shape in shapes])
    times = np.array([sample.time_s for sample in samples])
    return FittedLatency(knots, _as_tuple(fit_relative(features, times)))


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


def _as_tuple(values: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
