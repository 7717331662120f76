"""How much of something was in use over a run of unknown length, in a record of fixed size."""

from typing import Final

MAX_POINTS: Final = 256


class UsageSeries:
    """Mean and peak of a step function of time, and its course as peaks over equal intervals.

    The intervals start short and double whenever there would be more than ``MAX_POINTS`` of them.
    """

    def __init__(self, interval_s: float = 0.25) -> None:
        self.interval_s = interval_s
        self.peaks: list[float] = [0.0]
        self._next_s = interval_s
        """When the next interval begins."""
        self._value = 0.0
        self._since_s = 0.0
        self._sum = 0.0

    def record(self, now: float, value: float) -> None:
        """Note that the value is this from now on."""
        if value == self._value:
            return
        self._advance(now)
        self._value = value
        if value > self.peaks[-1]:
            self.peaks[-1] = value

    def mean(self, now: float) -> float:
        """Return the mean over time from 0 to ``now``."""
        self._advance(max(now, self._since_s))
        return self._sum / now if now > 0 else self._value

    @property
    def peak(self) -> float:
        """Largest value so far."""
        return max(self.peaks)

    def _advance(self, now: float) -> None:
        self._sum += self._value * (now - self._since_s)
        self._since_s = now
        if now >= self._next_s:
            self._begin_intervals(now)

    def _begin_intervals(self, now: float) -> None:
        while now >= self.interval_s * MAX_POINTS:
            self._merge()
        missing = int(now / self.interval_s) + 1 - len(self.peaks)
        if missing > 0:
            self.peaks += [self._value] * missing
        self._next_s = len(self.peaks) * self.interval_s

    def _merge(self) -> None:
        if len(self.peaks) % 2:
            self.peaks.append(self.peaks[-1])
        self.peaks = [max(pair) for pair in zip(self.peaks[::2], self.peaks[1::2], strict=True)]
        self.interval_s *= 2
