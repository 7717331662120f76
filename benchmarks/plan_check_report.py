"""What ``plan_check`` found, as data and as tables."""

import math
from collections.abc import Sequence

import msgspec
from rich.table import Table

from disagg.bench.compare.race import Entrant, Heat, Standing


class Placed(msgspec.Struct, frozen=True):
    """A contender with what was planned for it, what is predicted for the live requests, and how it raced."""

    words: str
    planned: float
    predicted: float
    entrant: Entrant

    @property
    def rate(self) -> float:
        """What was measured of the first requests, 0 for a rival that is not better."""
        return self.entrant.found[0].rate if self.entrant.found else 0.0


class CheckedCase(msgspec.Struct, frozen=True):
    """A workload under objectives. The first placement is the plan's."""

    workload: str
    kind: str
    slo: str
    num_requests: int
    placements: tuple[Placed, ...]

    @property
    def verdict(self) -> str:
        """Whether the plan was right."""
        standings = [one.entrant.standing for one in self.placements[1:]]
        num_unknown = standings.count(Standing.UNKNOWN)
        for standing, words in ((Standing.AHEAD, "NO"), (Standing.TIED, "within noise")):
            if standing in standings:
                return words
        if not self.placements[0].rate:
            return "serves nothing"
        if num_unknown == len(standings):
            return "nothing beside"
        return f"yes, {num_unknown} not tried" if num_unknown else "yes"

    @property
    def shortfall(self) -> float:
        """What the chosen placement lacks of the best of those that are better."""
        best = max(one.rate for one in self.placements)
        return 1 - self.placements[0].rate / best if best else 0.0


def heat_words(heat: Heat) -> str:
    """Return one run in words."""
    return (
        f"at {heat.rate:.3g} requests/s, seed {heat.seed}: {'met' if heat.is_met else 'missed'}, attainment "
        f"{'>= ' if heat.is_cut else ''}{heat.attainment.share:.0%}, TTFT P90 {heat.ttft_p90_s:.2f} s, TPOT P90 "
        f"{heat.tpot_p90_s * 1e3:.1f} ms, served {heat.served_rate:.3g}/s{', cut' if heat.is_cut else ''}"
    )


def summary(checked: Sequence[CheckedCase]) -> Table:
    """Return the chosen beside what was found better."""
    drawn = Table(title="what the plan chose, requests/s")
    for heading in ("case", "requests", "chosen", "planned", "predicted", "measured", "best", "its", "agrees"):
        drawn.add_column(heading, overflow="fold")
    for case in checked:
        first = case.placements[0]
        best = max(case.placements, key=lambda one: one.rate)
        words = f"{case.verdict} ({case.shortfall:.0%})" if best is not first else case.verdict
        cells = (f"{first.planned:.3g}", f"{first.predicted:.3g}", f"{first.rate:.3g}", best.words, f"{best.rate:.3g}")
        drawn.add_row(f"{case.workload}, {case.kind}: {case.slo}", str(case.num_requests), first.words, *cells, words)
    return drawn


def details(case: CheckedCase) -> Table:
    """Return the first run of each rival, with the chosen's at the nearest rate of the same requests."""
    drawn = Table(title=f"{case.workload}, {case.kind}: {case.slo}")
    columns = ("placement", "planned", "predicted", "at", "attainment", "TTFT P90 s", "TPOT P90 ms", "served")
    for heading in (*columns, "the chosen: at", "attainment", "TTFT P90 s", "TPOT P90 ms", "served", "standing"):
        drawn.add_column(heading, overflow="fold")
    chosen = case.placements[0]
    for one in case.placements[1:]:
        row = [one.words, f"{one.planned:.3g}", f"{one.predicted:.3g}"]
        heats = one.entrant.heats[:1]
        for heat in heats:
            row += heat_cells(heat)
            same = [known for known in chosen.entrant.heats if known.seed == heat.seed]
            row += heat_cells(min(same, key=lambda known: abs(math.log(known.rate / heat.rate))))
        standing = one.entrant.standing
        drawn.add_row(*row, *[""] * (10 - 10 * len(heats)), standing.value if standing else "")
    return drawn


def heat_cells(heat: Heat) -> list[str]:
    """Return a run as cells."""
    attainment = f"{'>= ' if heat.is_cut else ''}{heat.attainment.share:.0%}"
    latencies = (f"{heat.ttft_p90_s:.2f}", f"{heat.tpot_p90_s * 1e3:.1f}")
    return [f"{heat.rate:.3g}", attainment, *latencies, f"{heat.served_rate:.3g}"]
