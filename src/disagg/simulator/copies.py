"""What a simulated instance copies from others' pools: links take their time, and steps that are read behind theirs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

from msgspec import structs

from disagg.base.ids import InstanceId, RequestId
from disagg.costs.coded_links import CodedLinks
from disagg.costs.links import SerialLinks
from disagg.scheduling.instance.inputs import CopyEnded
from disagg.scheduling.instance.outputs import StartCopy
from disagg.simulator.step_ends import StepEnds
from disagg.simulator.timeline_page import TimelineRecorder

FAILED_PULL: Final = "the pull was made to fail"
LOST_PEER: Final = "the instance that was read from died"


@dataclass(slots=True)
class _UnderWay:
    copy: StartCopy
    ended: CopyEnded
    read_s: float
    """When it would end if all that it reads were there from the beginning."""
    num_moved: int = 0
    """How often its end has been planned anew."""


class Copies:
    """Those of one life of an instance.

    ``later`` makes a call at a time, unless this life has ended by then; ``on_ended`` takes what there is to be said of
    a copy that has ended. A copy of one of the ``failing_pulls`` fails, once.
    """

    def __init__(
        self,
        instance: InstanceId,
        links: SerialLinks | CodedLinks,
        step_ends: StepEnds,
        failing_pulls: set[RequestId],
        later: Callable[[float, Callable[[], None]], None],
        on_ended: Callable[[CopyEnded], None],
        timeline: TimelineRecorder | None = None,
    ) -> None:
        self._instance = instance
        self._links = links
        self._step_ends = step_ends
        self._failing_pulls = failing_pulls
        self._later = later
        self._on_ended = on_ended
        self._timeline = timeline
        self._lost_peers: set[str] = set()
        self._is_over = False

    def start(self, copy: StartCopy, num_bytes: int, now: float) -> None:
        """Begin to read."""
        end_s = self._links.start(copy.source, self._instance, num_bytes, now)
        failure = FAILED_PULL if copy.request_id in self._failing_pulls else ""
        self._failing_pulls.discard(copy.request_id)
        ended = CopyEnded(
            request_id=copy.request_id,
            epoch=copy.epoch,
            num_bytes=0 if failure else num_bytes,
            started_s=now,
            ended_s=end_s,
            failure=failure,
        )
        under_way = _UnderWay(copy, ended, end_s)
        if copy.offer.behind_step:
            self._step_ends.follow(copy, partial(self._move, under_way))
        self._plan(under_way)

    def lose(self, incarnation: str) -> None:
        """What is read from a life that has ended is worth nothing."""
        self._lost_peers.add(incarnation)

    def drop(self) -> None:
        """The instance dies."""
        self._is_over = True

    def _move(self, under_way: _UnderWay) -> None:
        if not self._is_over:
            under_way.num_moved += 1
            self._plan(under_way)

    def _plan(self, under_way: _UnderWay) -> None:
        copy, ended = under_way.copy, under_way.ended
        if copy.offer.behind_step:
            end_s = self._step_ends.end_of(copy, ended.started_s, under_way.read_s)
            under_way.ended = structs.replace(ended, ended_s=end_s)
        self._later(under_way.ended.ended_s, partial(self._end, under_way, under_way.num_moved))

    def _end(self, under_way: _UnderWay, num_moved: int) -> None:
        copy, ended = under_way.copy, under_way.ended
        if num_moved != under_way.num_moved:
            return
        if self._timeline is not None:
            self._timeline.pull(copy.request_id, copy.source, self._instance, ended.started_s, ended.ended_s)
        if copy.offer.incarnation in self._lost_peers:
            ended = structs.replace(ended, num_bytes=0, failure=ended.failure or LOST_PEER)
        self._on_ended(ended)
