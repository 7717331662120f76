"""Predicted step times for whoever plans steps: by a model that is given, or by one learned from the steps that run.

What is learned are the coefficients of a few sums over a step (see ``StepShape``): recursive least squares on the
relative error, with forgetting. Steps with prefill and steps of decodes alone are forgotten each at their own pace, so
that an hour of decodes alone does not make the cost of prefill unknown. Plain arithmetic in a fixed order: the same
steps give the same bits on every machine, which the replay of an event log needs.
"""

from typing import Final

from msgspec.structs import astuple

from disagg.base.messages import StepCosts
from disagg.costs.latency import LatencyModel, StepShape
from disagg.costs.step_costs import PRIOR_COSTS

_NUM: Final = len(StepCosts.__struct_fields__)
_PRIOR_WEIGHT: Final = 1e-3
"""Of each coefficient of the prior, in steps."""
_KEPT: Final = 0.995
"""Part of what was learned that each further step of the kind leaves: a memory of some 200 steps."""
_EAGER_STEPS: Final = 64
_REFIT_EVERY: Final = 8
"""After the first ``_EAGER_STEPS``, each followed by a fit."""
_ENOUGH_PREFILLS: Final = 4
"""Steps with prefill after which what was learned of them is believed."""
_ERROR_KEPT: Final = 0.98
_FIRST_ERROR: Final = 0.25
"""Assumed until steps have shown another."""


class OnlineFit:
    """Learns what steps cost. ``version`` grows with each fit."""

    def __init__(self) -> None:
        self.version = 0
        self._factors = [1.0] * _NUM
        """Coefficients as parts of the prior's."""
        self._sums = {True: _Sums(), False: _Sums()}
        """By whether the steps had prefill in them."""
        self._num_steps = 0
        self._num_unfitted = 0

    def costs(self) -> StepCosts:
        """Return the coefficients as they are known now."""
        self._refit()
        return StepCosts(*(factor * part for factor, part in zip(self._factors, astuple(PRIOR_COSTS), strict=True)))

    def predict_s(self, shape: StepShape) -> float:
        """Return the seconds that a step of this shape will take."""
        self._refit()
        return sum(factor * part for factor, part in zip(self._factors, _prior_parts(shape), strict=True))

    def learn(self, shape: StepShape, duration_s: float) -> None:
        """Take account of a step that took ``duration_s``, above 0."""
        self._sums[shape.num_prefills > 0].add([part / duration_s for part in _prior_parts(shape)])
        self._num_steps += 1
        self._num_unfitted += 1

    def _refit(self) -> None:
        if not self._num_unfitted or (self._num_steps > _EAGER_STEPS and self._num_unfitted < _REFIT_EVERY):
            return
        self._num_unfitted = 0
        self.version += 1
        first, second = self._sums.values()
        matrix = [
            [a + b for a, b in zip(*rows, strict=True)] for rows in zip(first.squares, second.squares, strict=True)
        ]
        for index in range(_NUM):
            matrix[index][index] += _PRIOR_WEIGHT
        right = [a + b + _PRIOR_WEIGHT for a, b in zip(first.right, second.right, strict=True)]
        self._factors = _solve_not_negative(matrix, right)


class _Sums:
    """The normal equations of least squares, each step less than the one after it. ``squares`` is a lower triangle."""

    def __init__(self) -> None:
        self.squares = [[0.0] * (row + 1) for row in range(_NUM)]
        self.right = [0.0] * _NUM

    def add(self, features: list[float]) -> None:
        """Add a step, whose features times the factors ought to be 1."""
        for feature, row in zip(features, self.squares, strict=True):
            for column, value in enumerate(row):
                row[column] = _KEPT * value + feature * features[column]
        self.right = [_KEPT * value + feature for value, feature in zip(self.right, features, strict=True)]


class StepTimes:
    """Predicts the steps of one instance, and keeps count of how far the predictions are from what steps took.

    By ``given`` where there is a model, and else by what is learned; ``always_learns`` beside a given one.
    """

    def __init__(self, given: LatencyModel | None = None, *, always_learns: bool = False) -> None:
        self._given = given
        self._learns = given is None or always_learns
        self._fit = OnlineFit()
        self.num_prefill_steps = 0
        """Of the steps that were learned from, those with prefill."""
        self.num_steps = 0
        """Steps that were predicted and measured."""
        self.measured_s = 0.0
        self.predicted_s = 0.0
        self.error = _FIRST_ERROR
        """Running mean of the absolute error, as a part of the step's duration."""

    @property
    def version(self) -> int:
        """Equal versions predict the same."""
        return 0 if self._given is not None else self._fit.version

    @property
    def knows_prefill(self) -> bool:
        """True when prefill is predicted by more than a guess."""
        return self._given is not None or self.num_prefill_steps >= _ENOUGH_PREFILLS

    def predict_s(self, shape: StepShape) -> float:
        """Return the seconds that a step of this shape will take."""
        if self._given is not None:
            return sum(self._given.stage_times_s(shape))
        return self._fit.predict_s(shape)

    def note(self, shape: StepShape, predicted_s: float, duration_s: float) -> None:
        """Compare a prediction with what the step took, and learn from it; 0 was not measured."""
        if duration_s <= 0:
            return
        self.num_steps += 1
        self.measured_s += duration_s
        self.predicted_s += predicted_s
        kept = min(_ERROR_KEPT, 1 - 1 / (self.num_steps + 1))
        self.error = kept * self.error + (1 - kept) * min(abs(predicted_s - duration_s) / duration_s, 1.0)
        if self._learns:
            self.num_prefill_steps += shape.num_prefills > 0
            self._fit.learn(shape, duration_s)

    def costs(self) -> StepCosts:
        """Return what was learned."""
        return self._fit.costs()


def _prior_parts(shape: StepShape) -> tuple[float, ...]:
    """Return the seconds of each feature by the prior."""
    prior = PRIOR_COSTS
    return (
        prior.step_s,
        prior.token_s * shape.num_tokens,
        prior.square_s * shape.prefill_squares,
        prior.prefill_s * shape.num_prefills,
        prior.context_s * shape.decode_context,
        prior.decode_s * shape.num_decodes,
    )


def _solve_not_negative(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Return the solution of the positive definite system, of which ``matrix`` is the lower triangle.

    What would be negative is left out, the worst first, and the rest solved again: durations only add up.
    """
    kept = list(range(_NUM))
    while kept:
        solution = _solve(
            [[matrix[a][b] for b in kept[: row + 1]] for row, a in enumerate(kept)], [right[a] for a in kept]
        )
        worst = min(range(len(kept)), key=solution.__getitem__)
        if solution[worst] >= 0:
            values = dict(zip(kept, solution, strict=True))
            return [values.get(index, 0.0) for index in range(_NUM)]
        del kept[worst]
    return [0.0] * _NUM


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Solve a positive definite system by Cholesky's decomposition of its lower triangle, in place."""
    size = len(right)
    for row in range(size):
        ours = matrix[row]
        for column in range(row):
            theirs = matrix[column]
            ours[column] = (ours[column] - sum(ours[k] * theirs[k] for k in range(column))) / theirs[column]
        ours[row] = max(ours[row] - sum(value * value for value in ours[:row]), 1e-12) ** 0.5
    for row in range(size):
        right[row] = (right[row] - sum(matrix[row][k] * right[k] for k in range(row))) / matrix[row][row]
    for row in reversed(range(size)):
        below = sum(matrix[k][row] * right[k] for k in range(row + 1, size))
        right[row] = (right[row] - below) / matrix[row][row]
    return right
