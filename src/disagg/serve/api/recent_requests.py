"""The requests that ended last, stage by stage: what ``/requests``, the dashboard and ``disagg top`` show."""

import time
from collections import deque
from collections.abc import Callable
from itertools import islice
from math import isnan
from typing import Final

from msgspec import structs

from disagg.measure.timeline import RequestTimeline, Stage
from disagg.serve.api.views import RequestPage, RequestView
from disagg.serve.router.interface import SequenceStream

MAX_KEPT: Final = 4096
MAX_PAGE: Final = 1000
DEFAULT_PAGE: Final = 100

_NO_STAMPS: Final = ("arrival_s", "paused_s", "pauses_s")
_STAMPS: Final = tuple(name for name in RequestTimeline.__struct_fields__ if name not in _NO_STAMPS)


class RecentRequests:
    """A bounded ring of the sequences that ended last, and a count of those under way."""

    def __init__(self, max_kept: int = MAX_KEPT, unix_time: Callable[[], float] = time.time) -> None:
        self._kept: deque[RequestView] = deque(maxlen=max_kept)
        self._newest = 0
        self._unix_time = unix_time
        self.num_under_way = 0

    def add(self, view: RequestView) -> None:
        """Keep one more under the next number, in place of the oldest where there is no room."""
        self._newest += 1
        self._kept.append(structs.replace(view, sequence=self._newest))

    def page(self, after: int, limit: int) -> RequestPage:
        """Return up to ``limit`` entries, oldest first, that came after number ``after``.

        A negative ``after`` asks for that many of the newest. One that was never given out is of an earlier life of the
        server, and is taken as 0: nothing is missed.
        """
        num_dropped = self._newest - len(self._kept)
        if after < 0:
            after = max(num_dropped, self._newest + after)
        elif after > self._newest:
            after = 0
        first = max(after, num_dropped)
        found = list(islice(self._kept, first - num_dropped, first - num_dropped + limit))
        return RequestPage(next=first + len(found), dropped=first - after, requests=found)

    def unix_time_of(self, moment_s: float, now: float) -> float:
        """Return the wall clock's time of a moment of the monotonic clock whose present time is ``now``."""
        return self._unix_time() - (now - moment_s)


def with_stages(view: RequestView, stream: SequenceStream, now: float) -> RequestView:
    """Return the view of a sequence that ended just now with who served it, and when."""
    timeline = stream.timeline
    if isnan(timeline.finished_s):  # aborted, or cut by a stop string: its stream never came to an end
        timeline = structs.replace(timeline, finished_s=now)
    stages = timeline.stages()
    if view.e2e_s is None:
        stages[Stage.DELIVERY] = 0.0  # what was waited for after the last token never came
    return structs.replace(
        view,
        prefill_instance=stream.served_by.prefill,
        decode_instance=stream.served_by.decode,
        is_best_effort=stream.is_best_effort,
        stages={stage.value: seconds for stage, seconds in stages.items()},
        stamps=_stamps_since_arrival(timeline),
    )


def _stamps_since_arrival(timeline: RequestTimeline) -> dict[str, float]:
    """Return the stamps that there are, by name without the unit."""
    offsets = ((name, getattr(timeline, name) - timeline.arrival_s) for name in _STAMPS)
    return {name.removesuffix("_s"): offset for name, offset in offsets if not isnan(offset)}
