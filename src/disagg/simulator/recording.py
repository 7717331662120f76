"""Who is told of every decision, step and gap of a simulation."""

from dataclasses import dataclass

from disagg.measure.statistics import LogHistogram
from disagg.simulator.event_log import EventLogFolder
from disagg.simulator.timeline_page import TimelineRecorder


@dataclass(frozen=True)
class Recording:
    """``log`` receives decisions, ``timeline`` steps and pulls, ``gaps`` the inter-token latencies in seconds.

    ``step_by_step`` asks the cores after every step, also where runs of equal decode steps can be timed ahead: slower,
    with equal results.
    """

    log: EventLogFolder | None = None
    timeline: TimelineRecorder | None = None
    gaps: LogHistogram | None = None
    step_by_step: bool = False

    @property
    def allows_repeats(self) -> bool:
        """True when nobody has to see each step."""
        return not self.step_by_step and self.log is None and self.timeline is None
