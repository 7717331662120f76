"""When the steps of simulated instances end: what is read behind one is not there before."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from disagg.base.ids import InstanceId
from disagg.scheduling.instance.outputs import StartCopy

LAST_LAYER: Final = 1 / 32
"""What of a read is left when the step has ended: a layer of as many as models have."""
_MOST_STEPS: Final = 16
"""Of an instance, in flight at once."""


@dataclass(slots=True)
class _StepEnd:
    time_s: float
    on_moved: list[Callable[[], None]] = field(default_factory=list)


class StepEnds:
    """The last steps of every life of the instances of a deployment."""

    def __init__(self) -> None:
        self._ends: dict[InstanceId, dict[tuple[str, int], _StepEnd]] = {}

    def note(self, instance: InstanceId, incarnation: str, step_id: int, end_s: float) -> None:
        """A step of an instance has begun, and will end then."""
        steps = self._ends.setdefault(instance, {})
        steps[incarnation, step_id] = _StepEnd(end_s)
        if len(steps) > _MOST_STEPS:
            del steps[next(iter(steps))]

    def move(self, instance: InstanceId, incarnation: str, step_id: int, end_s: float) -> None:
        """A step will end at another time: those that read behind it are told."""
        end = self._ends.get(instance, {}).get((incarnation, step_id))
        if end is not None and end.time_s != end_s:
            end.time_s = end_s
            for call in end.on_moved:
                call()

    def follow(self, copy: StartCopy, on_moved: Callable[[], None]) -> None:
        """Call this when the step that a copy reads behind ends at another time than was thought."""
        end = self._find(copy)
        if end is not None:
            end.on_moved.append(on_moved)

    def end_of(self, copy: StartCopy, started_s: float, end_s: float) -> float:
        """Return when a copy ends that would end at ``end_s`` if all that it reads were there."""
        end = self._find(copy)
        written_s = started_s if end is None else end.time_s
        return max(end_s, written_s + (end_s - started_s) * LAST_LAYER)

    def _find(self, copy: StartCopy) -> _StepEnd | None:
        return self._ends.get(copy.source, {}).get((copy.offer.incarnation, copy.offer.behind_step))
