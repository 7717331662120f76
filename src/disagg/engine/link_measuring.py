"""Links that the router wants measured: in a thread for each, beside the steps and the pulls."""

import threading
from collections import deque
from collections.abc import Callable

from disagg.base.clock import Clock
from disagg.base.errors import ProtocolError, TransferError
from disagg.base.ids import InstanceId
from disagg.base.messages import LinkFigure, LinkMeasured, MeasureLink
from disagg.transfer.link_probe import measure_link
from disagg.transfer.links import Links


class LinkMeasuring:
    """The measurements of one instance. ``wake`` is called from their threads when one has ended."""

    def __init__(
        self, instance: InstanceId, incarnation: str, links: Links, clock: Clock, wake: Callable[[], None]
    ) -> None:
        self._instance = instance
        self._incarnation = incarnation
        self._links = links
        self._clock = clock
        self._wake = wake
        self._ended: deque[LinkMeasured] = deque()
        self._last: dict[InstanceId, LinkMeasured] = {}

    def start(self, asked: MeasureLink) -> None:
        """Measure; from the loop's thread, to which links belong."""
        try:
            link = self._links.open(asked.pool, asked.source)
            why = self._links.why(asked.pool)
        except (TransferError, ProtocolError) as error:
            self._end(asked, LinkFigure(failure=str(error)))
            return

        def measure() -> None:
            try:
                figure = measure_link(link, asked.access, why, self._clock)
            except Exception as error:  # whoever asked must hear of the end
                figure = LinkFigure(link=link.kind.value, why=why, failure=str(error) or type(error).__name__)
            self._end(asked, figure)

        try:
            threading.Thread(target=measure, name="link-measuring", daemon=True).start()
        except RuntimeError as error:  # threads are short, and a figure is not worth an instance
            self._end(asked, LinkFigure(failure=str(error)))

    def take_ended(self) -> list[LinkMeasured]:
        """Return what was measured since the last call."""
        ended = []
        while self._ended:
            measured = self._ended.popleft()
            self._last[measured.source] = measured
            ended.append(measured)
        return ended

    @property
    def known(self) -> tuple[LinkMeasured, ...]:
        """What was measured last of each link, for a router that comes late."""
        return tuple(self._last.values())

    def _end(self, asked: MeasureLink, figure: LinkFigure) -> None:
        self._ended.append(
            LinkMeasured(
                instance=self._instance,
                incarnation=self._incarnation,
                source=asked.source,
                source_incarnation=asked.incarnation,
                figure=figure,
            )
        )
        self._wake()
