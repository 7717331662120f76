"""Least squares on the relative error, with coefficients that are never negative."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class FitError:
    """Relative errors of predictions, absolute values as fractions."""

    num_samples: int
    mean: float
    median: float
    p90: float
    maximum: float

    def __str__(self) -> str:
        return f"median {self.median:.1%}, P90 {self.p90:.1%}, worst {self.maximum:.1%} of {self.num_samples} samples"


def fit_relative(features: NDArray[np.float64], targets: Vector, wholes: Vector | None = None) -> Vector:
    """Return coefficients c >= 0 that minimise the sum of ((features @ c - targets) / wholes) ** 2.

    ``features`` is [samples, features], ``targets`` [samples]; ``wholes`` [samples], all positive, are what errors are
    relative to: the targets themselves unless given. Where plain least squares would make a coefficient negative, that
    feature is left out and the rest fitted again: durations only add up.
    """
    wholes = targets if wholes is None else wholes
    scaled = features / wholes[:, None]
    # Equal scales make "singular" mean the same for every feature.
    scale = np.linalg.norm(scaled, axis=0)
    kept = np.flatnonzero(scale > 0)
    solution = np.zeros(0)
    while len(kept):
        solution, *_ = np.linalg.lstsq(scaled[:, kept] / scale[kept], targets / wholes, rcond=1e-9)
        if solution.min() >= 0:
            break
        kept = np.delete(kept, solution.argmin())
    coefficients = np.zeros(features.shape[1])
    coefficients[kept] = solution[: len(kept)] / scale[kept]
    return coefficients


def relative_error(predictions: Vector, targets: Vector) -> FitError:
    """Compare predictions with measurements."""
    errors = np.abs(predictions - targets) / targets
    return FitError(
        num_samples=len(errors),
        mean=float(np.mean(errors)),
        median=float(np.median(errors)),
        p90=float(np.percentile(errors, 90)),
        maximum=float(errors.max()),
    )
