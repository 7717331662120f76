"""The steps of a simulated instance that borrows cores: the pace of the one in flight changes with its neighbours."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from disagg.base.ids import InstanceId
from disagg.costs.latency import LatencyModel, StepShape
from disagg.scheduling.step.actions import RunStep
from disagg.simulator.borrowing_step import BorrowingStep
from disagg.simulator.host import SimulatedHost
from disagg.simulator.instance_spec import InstanceSpec
from disagg.simulator.step_ends import StepEnds
from disagg.simulator.timeline_page import TimelineRecorder


@dataclass(slots=True)
class _InFlight:
    step: RunStep
    shape: StepShape
    pace: BorrowingStep


class PacedSteps:
    """Those of one life of an instance, one at a time.

    ``later`` makes a call at a time, unless this life has ended by then; ``on_end`` takes a step that has ended, what
    it took, and what others' cores computed of it, in seconds.
    """

    def __init__(
        self,
        spec: InstanceSpec,
        incarnation: str,
        host: SimulatedHost,
        step_ends: StepEnds,
        later: Callable[[float, Callable[[], None]], None],
        on_end: Callable[[RunStep, float, float], None],
        timeline: TimelineRecorder | None = None,
    ) -> None:
        self._spec = spec
        self._incarnation = incarnation
        self._host = host
        self._step_ends = step_ends
        self._later = later
        self._on_end = on_end
        self._timeline = timeline
        self._alone = spec.paces
        self._paces: Mapping[int, LatencyModel] = self._alone
        self._num_borrowed = 0
        self._in_flight: _InFlight | None = None

    @property
    def _name(self) -> InstanceId:
        return self._spec.name

    def begin(self, step: RunStep) -> LatencyModel:
        """Take the own cores back and borrow others for a step; return the latency model on what there is now."""
        self._paces = self._host.begin_step(self._name, step.num_borrowed, self._alone)
        self._num_borrowed = self._host.num_borrowed(self._name)
        return self._paces[max(number for number in self._paces if number <= self._num_borrowed)]

    def run(self, step: RunStep, shape: StepShape, started_s: float) -> float:
        """Compute the step that was begun; return when it ends if nothing changes."""
        times_s = {number: latency.stage_times_s(shape)[0] for number, latency in self._paces.items()}
        self._in_flight = _InFlight(step, shape, BorrowingStep(times_s, started_s, self._num_borrowed))
        end_s = self._in_flight.pace.end_s
        if self._spec.shows_progress:
            self._step_ends.note(self._name, self._incarnation, step.step_id, end_s)
        self._plan_end(self._in_flight)
        return end_s

    def change(self, now: float) -> None:
        """Go on with the cores that there are now."""
        self._num_borrowed = self._host.num_borrowed(self._name)
        in_flight = self._in_flight
        if in_flight is not None:
            in_flight.pace.change(now, self._num_borrowed)
            if self._spec.shows_progress:
                self._step_ends.move(self._name, self._incarnation, in_flight.step.step_id, in_flight.pace.end_s)
            self._plan_end(in_flight)

    def drop(self) -> None:
        """The instance dies."""
        self._in_flight = None
        self._host.end_step(self._name)
        self._host.lend(self._name)

    def _plan_end(self, in_flight: _InFlight) -> None:
        end_s = in_flight.pace.end_s
        self._later(end_s, partial(self._end, in_flight, end_s))

    def _end(self, in_flight: _InFlight, due_s: float) -> None:
        pace = in_flight.pace
        if self._in_flight is not in_flight or pace.end_s != due_s:
            return
        self._in_flight = None
        pace.finish()
        if self._timeline is not None:
            self._timeline.step(self._name, pace.started_s, pace.end_s, in_flight.shape)
        self._on_end(in_flight.step, pace.end_s - pace.started_s, pace.borrowed_s)
