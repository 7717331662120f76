"""What a step in flight is made of."""

from dataclasses import dataclass

from disagg.costs.latency import StepShape
from disagg.scheduling.step.actions import Chunk
from disagg.scheduling.step.sequence import Sequence


@dataclass(slots=True)
class StepForecast:
    """What a step is expected to take, and when it is expected to end."""

    shape: StepShape
    predicted_s: float
    end_s: float


@dataclass(slots=True)
class PlannedStep:
    """What each sequence computes in a step, the chunks alone, and a forecast where one is asked for."""

    parts: tuple[tuple[Sequence, Chunk], ...]
    chunks: tuple[Chunk, ...]
    forecast: StepForecast | None = None
