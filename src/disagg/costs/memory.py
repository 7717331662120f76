"""Memory bandwidth that instances of one host share: what a decoding neighbour takes of it.

A decode step waits for its bytes: weights and KV. Two instances that read at once get half of what all their cores read
together, so each byte takes 2 / together seconds where it took 1 / alone. What that is more is the scarcity: nothing,
where the cores of two instances read twice what those of one do. On two cores of a shared host ``together`` is now 50
GB/s and now 70, and a decoding neighbour costs a lone decode milliseconds or nothing (``disagg profile`` prints it).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Annotated

import msgspec
from msgspec import Meta

BytesPerSecond = Annotated[float, Meta(ge=1, le=1e18)]


class MemorySample(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bytes per second that the cores of one instance read, and those of two at once."""

    alone: BytesPerSecond
    together: BytesPerSecond


@dataclass(frozen=True)
class Scarcity:
    """How scarce memory bandwidth is for two instances that read at once, in seconds that a byte takes longer.

    ``alone`` is what the cores of one instance read, in bytes per second; ``usual`` is the scarcity to predict for.
    """

    alone: float
    usual: float

    @classmethod
    def of(cls, profiled: Sequence[MemorySample], together: Sequence[float] = ()) -> "Scarcity | None":
        """Return that of a profile's readings, to predict for their mean, or for two instances that read ``together``.

        None where there are no readings.
        """
        if not profiled:
            return None
        alone = median(sample.alone for sample in profiled)
        wanted = together or [sample.together for sample in profiled]
        return cls(alone, fmean(_added_s(alone, one) for one in wanted))

    def where(self, together: float) -> float:
        """Return the scarcity where the cores of both read ``together`` bytes per second."""
        return _added_s(self.alone, together)


def _added_s(alone: float, together: float) -> float:
    return max(0.0, 2 / together - 1 / alone)
