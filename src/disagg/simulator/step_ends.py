"""When the steps of simulated instances end: what is read behind one is not there before."""

from typing import Final

from disagg.base.ids import InstanceId
from disagg.scheduling.instance.outputs import StartCopy

LAST_LAYER: Final = 1 / 32
"""What of a read is left when the step has ended: a layer of as many as models have."""
_MOST_STEPS: Final = 16
"""Of an instance, in flight at once."""


class StepEnds:
    """The last steps of every life of the instances of a deployment."""

    def __init__(self) -> None:
        self._ends_s: dict[InstanceId, dict[tuple[str, int], float]] = {}

    def note(self, instance: InstanceId, incarnation: str, step_id: int, end_s: float) -> None:
        """A step of an instance has begun, and will end then."""
        steps = self._ends_s.setdefault(instance, {})
        steps[incarnation, step_id] = end_s
        if len(steps) > _MOST_STEPS:
            del steps[next(iter(steps))]

    def end_of(self, copy: StartCopy, started_s: float, end_s: float) -> float:
        """Return when a copy ends that would end at ``end_s`` if all that it reads were there."""
        step = copy.offer.incarnation, copy.offer.behind_step
        written_s = self._ends_s.get(copy.source, {}).get(step, started_s)
        return max(end_s, written_s + (end_s - started_s) * LAST_LAYER)
