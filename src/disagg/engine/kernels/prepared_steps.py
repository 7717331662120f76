"""What a backend derives from the batch of a step once, for all its layers."""

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from disagg.engine.kernels.interface import MOST_TABLES, StepBatch

Prepared = TypeVar("Prepared")


class PreparedSteps(Generic[Prepared]):
    """The last steps in a backend's own form. A batch must not change while it is in use."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[StepBatch, Hashable, Prepared]] = {}
        """By the identity of their batches: one of them, or of the tables that it has."""

    def get(self, batch: StepBatch, shape: Hashable, prepare: Callable[[], Prepared]) -> Prepared:
        """Return what ``prepare`` made of ``batch`` for layers of this shape: called for the first of them alone."""
        known = self._known.get(id(batch))
        if known is not None and known[1] == shape:
            return known[2]
        prepared = prepare()
        if len(self._known) >= MOST_TABLES:
            self._known.clear()
        self._known[id(batch)] = (batch, shape, prepared)
        return prepared
