"""How far a plan is, for whoever shows it."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class PlanProgress:
    """``done`` of about ``total`` searches, and the best so far in words."""

    done: int
    total: int
    best: str


OnProgress = Callable[[PlanProgress], None]
