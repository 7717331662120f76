"""One of several routers says once a second what has come to it, and leaves it to the keeper what follows. Pure."""

from typing import Final

from msgspec import structs

from disagg.scheduling.dispatch.experience import Experience
from disagg.scheduling.dispatch.sequence_sample import SequenceSample
from disagg.scheduling.dispatch.workload import WorkloadCounts, WorkloadWindow
from disagg.scheduling.dispatch.workload_report import HandedOver, ReportedSample, WorkloadReport

REPORT_S: Final = 1.0


class WorkloadReporter:
    """Reports what has come to a router. ``window`` and ``experience`` are its dispatcher's.

    ``tells_samples``: what becomes of each sequence is wanted as well.
    """

    def __init__(self, window: WorkloadWindow, experience: Experience, *, tells_samples: bool) -> None:
        self._window = window
        self._experience = experience
        self._tells_samples = tells_samples
        self._told = WorkloadCounts()
        self._told_hand_overs = HandedOver()
        self._open: dict[int, tuple[SequenceSample, SequenceSample]] = {}
        """Sequences that have not ended, by number: as they are, and as they were told."""

    def report(self) -> WorkloadReport | None:
        """Return what is new; None where nothing is."""
        counts = self._window.counts
        report = self._window.news(self._told)
        if self._tells_samples:
            report = structs.replace(
                report, changed=self._changed(), taken=self._taken(counts), handed_over=self._handed_over()
            )
        self._told = counts
        return None if report == WorkloadReport() else report

    def _taken(self, counts: WorkloadCounts) -> tuple[ReportedSample, ...]:
        taken = self._window.taken(self._told.taken, counts.taken - self._told.taken)
        rows = []
        for number, sample in enumerate(taken, start=counts.taken - len(taken)):
            rows.append(self._as_told(number, sample))
        return tuple(rows)

    def _changed(self) -> tuple[ReportedSample, ...]:
        oldest = self._window.oldest_taken
        for number in [one for one in self._open if one < oldest]:
            del self._open[number]
        news = [(number, sample) for number, (sample, told) in self._open.items() if sample != told]
        return tuple(self._as_told(number, sample) for number, sample in news)

    def _as_told(self, number: int, sample: SequenceSample) -> ReportedSample:
        told = structs.replace(sample)
        if sample.has_ended:
            self._open.pop(number, None)
        else:
            self._open[number] = (sample, told)
        return ReportedSample(number, told)

    def _handed_over(self) -> HandedOver:
        total, told = self._experience.handed_over, self._told_hand_overs
        self._told_hand_overs = total
        return HandedOver(
            total.count - told.count, total.num_tokens - told.num_tokens, max(0.0, total.duration_s - told.duration_s)
        )
