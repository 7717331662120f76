"""What an instance learns of its steps, and when it tells the router."""

from typing import Final

from disagg.base.messages import CostsLearned
from disagg.costs.step_times import StepTimes
from disagg.scheduling.instance.header import InstanceHeader

_FIRST_LESSON: Final = 4
"""Steps after which the router is told what was learned; then at twice as many, or after ``_LESSON_EVERY`` more."""
_LESSON_EVERY: Final = 64


def given_times(header: InstanceHeader) -> StepTimes | None:
    """Return the step times that an instance begins with; None where it begins with none."""
    if header.latency is None:
        return None
    return StepTimes(header.latency, always_learns=header.settings.tells_costs)


class Lessons:
    """The lessons of one instance that tells what it learns."""

    def __init__(self, header: InstanceHeader) -> None:
        self._header = header
        self._due_at = _FIRST_LESSON

    def due(self, times: StepTimes | None) -> CostsLearned | None:
        """Return what is to be told now, if anything is."""
        if times is None or times.num_steps < self._due_at:
            return None
        self._due_at = times.num_steps + min(times.num_steps, _LESSON_EVERY)
        return CostsLearned(
            instance=self._header.instance,
            incarnation=self._header.incarnation,
            costs=times.costs(),
            num_prefill_steps=times.num_prefill_steps,
            num_decode_steps=times.num_steps - times.num_prefill_steps,
        )
