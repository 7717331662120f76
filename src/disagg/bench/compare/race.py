"""One system against its rivals: does any serve more by more than a part of it, in few runs. Pure.

The first is measured. Every rival then gets one run with the same requests and arrivals, at a rate that it can keep
only if it is better by more than ``within``: most rivals miss it, and cost that run. One that keeps it is measured
further, and both with other requests, to tell a difference from the luck of a seed.
"""

import enum
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

import msgspec

from disagg.measure.goodput_search import bracket_goodput
from disagg.measure.statistics import Share

_ROUNDING: Final = 1e-9
_COARSE: Final = 0.1
"""How closely a rival is measured that is better."""


class Heat(msgspec.Struct, frozen=True, kw_only=True):
    """What one run told, with the requests of ``seed`` at ``rate`` requests/s. Latencies are of finished requests."""

    rate: float
    seed: int
    attainment: Share
    ttft_p90_s: float
    tpot_p90_s: float
    is_met: bool
    """The target was kept."""
    keeps_tpot: bool
    """As many answers as the target wants kept the TPOT objective, of those that ended."""
    served_rate: float
    """Requests/s until nine in ten had ended, or until the run was given up."""
    is_cut: bool
    """Given up early: the attainment is a lower bound, and the latencies are those of the first requests."""


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """Requests/s that a system serves of the requests of a seed: at least ``rate``, and less than ``missed``."""

    seed: int
    rate: float
    missed: float


class Standing(enum.Enum):
    """What came of a rival."""

    BEHIND = "not better"
    TIED = "within noise"
    """Better with the requests of some seeds, not of others."""
    AHEAD = "better"
    UNKNOWN = "no time"


@dataclass(frozen=True)
class Entrant:
    """A system in a race, by its number. The first is the one that the others are to beat; it has no standing."""

    number: int
    heats: tuple[Heat, ...] = ()
    found: tuple[Found, ...] = ()
    standing: Standing | None = None


class RunHeat(Protocol):
    """Runs a load on the system that is up. A run may be given up once it can no longer meet, and at ``deadline_s``."""

    def __call__(self, rate: float, seed: int, *, deadline_s: float = math.inf, gives_up: bool = True) -> Heat:
        """Return what the run told."""


class Judge(Protocol):
    """A way to measure what a system serves."""

    def measure(self, run_heat: RunHeat, seed: int, near: Found | None = None) -> Found | None:
        """Return what the first serves, which is ``near`` what was found before; None where this way does not tell."""

    def challenge(self, run_heat: RunHeat, known: Found, *, searches: bool) -> Found:
        """Return what a rival serves of the requests with which the first serves ``known``.

        Its ``rate`` is 0 where it is not better; with ``searches`` it is otherwise as high as was found.
        """


@dataclass(frozen=True, kw_only=True)
class ByRates:
    """Measures the highest rate that keeps the target, beginning at ``start_rate``."""

    start_rate: float
    within: float = 0.05
    growth: float = 1.15
    max_steps: int = 6

    def measure(self, run_heat: RunHeat, seed: int, near: Found | None = None) -> Found:
        """Search. The bracket is narrow enough that a rival's rate is not below what the first missed."""
        tolerance = self.within / (1 - self.within)
        start_rate = near.rate if near is not None and near.rate else self.start_rate
        return self._search(lambda rate: run_heat(rate, seed).is_met, seed, start_rate, tolerance)

    def challenge(self, run_heat: RunHeat, known: Found, *, searches: bool) -> Found:
        """Run at the rate that only a better one keeps; then go on from there, less closely."""
        bar = known.rate / (1 - self.within) or known.missed
        if not run_heat(bar, known.seed).is_met:
            return Found(seed=known.seed, rate=0.0, missed=bar)
        if not searches:
            return Found(seed=known.seed, rate=bar, missed=math.inf)
        seed = known.seed
        return self._search(lambda rate: rate == bar or run_heat(rate, seed).is_met, seed, bar, _COARSE)

    def _search(self, meets: Callable[[float], bool], seed: int, start_rate: float, tolerance: float) -> Found:
        bracket = bracket_goodput(
            meets, start_rate, tolerance=tolerance, max_doublings=self.max_steps, growth=self.growth
        )
        return Found(seed=seed, rate=bracket.met, missed=bracket.missed)


@dataclass(frozen=True, kw_only=True)
class ByFlood:
    """Measures how fast a system works off ``num_requests`` that come far quicker than it serves them, at ``rate``.

    For TTFT objectives so long that a run is over before a queue is felt: what holds such a system back in the long
    run is how much it gets done. Tells nothing of one that misses its TPOT objective meanwhile.
    """

    rate: float
    num_requests: int
    within: float = 0.05

    def measure(self, run_heat: RunHeat, seed: int, near: Found | None = None) -> Found | None:
        """Flood; None where too few answers keep their TPOT."""
        heat = run_heat(self.rate, seed, gives_up=False)
        return _served(heat) if heat.keeps_tpot else None

    def challenge(self, run_heat: RunHeat, known: Found, *, searches: bool) -> Found:
        """Flood until the first would have been done; where answers miss their TPOT, try the rate to beat as well."""
        bar = known.rate / (1 - self.within)
        heat = run_heat(self.rate, known.seed, deadline_s=_part_served(self.num_requests) / bar, gives_up=False)
        if heat.served_rate >= bar and (heat.keeps_tpot or run_heat(bar, known.seed).is_met):
            return _served(heat)
        return Found(seed=known.seed, rate=0.0, missed=bar)


def _served(heat: Heat) -> Found:
    return Found(seed=heat.seed, rate=heat.served_rate, missed=heat.served_rate)


def _part_served(num_requests: int) -> int:
    return math.ceil(0.9 * num_requests - _ROUNDING)


def served_rate(ended_s: Sequence[float], num_requests: int, wall_s: float) -> float:
    """Return the requests/s until nine in ten had ended; of a run that was given up before, those until then.

    ``ended_s`` are the times at which requests ended, ``wall_s`` how long the run took. The last tenth is left out, as
    a server that has little to do says nothing of a busy one.
    """
    wanted = _part_served(num_requests)
    if len(ended_s) >= wanted:
        return wanted / sorted(ended_s)[wanted - 1]
    return len(ended_s) / wall_s if wall_s > 0 else 0.0


@dataclass
class Race:
    """A race under way. ``open_system`` starts the system of a number and gives what runs loads on it."""

    num_systems: int
    open_system: Callable[[int], AbstractContextManager[RunHeat]]
    judges: Sequence[Judge]
    """The first that tells anything is taken."""
    seeds: Sequence[int]
    has_time: Callable[[], bool]
    """Whether another system may be run: asked before each but the first."""
    on_standing: Callable[[int, Standing], None] = lambda number, standing: None
    _entrants: dict[int, Entrant] = field(default_factory=dict)

    def run(self) -> tuple[Entrant, ...]:
        """Race, and return all entrants by number."""
        judge, known = self._measure_first()
        for number in range(1, self.num_systems):
            if not self.has_time():
                self._set(number, Standing.UNKNOWN)
                continue
            with self._running(number) as run_heat:
                found = judge.challenge(run_heat, known, searches=True)
            self._add(number, found)
            self._set(number, Standing.AHEAD if found.rate else Standing.BEHIND)
        challengers = [one for one in self._entrants.values() if one.standing is Standing.AHEAD]
        for challenger in sorted(challengers, key=lambda one: -one.found[0].rate):
            self._settle(judge, challenger.number)
        return tuple(self._entrants[number] for number in range(self.num_systems))

    def _measure_first(self) -> tuple[Judge, Found]:
        with self._running(0) as run_heat:
            for judge in self.judges:
                found = judge.measure(run_heat, self.seeds[0])
                if found is not None:
                    self._add(0, found)
                    return judge, found
        raise ValueError("no judge tells what the first system serves: end with one by rates")

    def _settle(self, judge: Judge, number: int) -> None:
        """Repeat with the other seeds, as far as there is time: a rival is better with all of them, or it is a tie."""
        missing = [seed for seed in self.seeds if seed not in self._by_seed(0)]
        if missing and self.has_time():
            with self._running(0) as run_heat:
                for seed in missing:
                    found = judge.measure(run_heat, seed, self._entrant(0).found[0])
                    if found is not None:
                        self._add(0, found)
                    if not self.has_time():
                        break
        if len(self._by_seed(0)) == 1 or not self.has_time():
            return
        with self._running(number) as run_heat:
            for seed in self.seeds[1:]:
                if seed in self._by_seed(0) and self.has_time():
                    self._add(number, judge.challenge(run_heat, self._by_seed(0)[seed], searches=False))
        num_better = sum(found.rate > 0 for found in self._entrants[number].found)
        if num_better < len(self._entrants[number].found):
            is_tie = 2 * num_better >= len(self._entrants[number].found)
            self._set(number, Standing.TIED if is_tie else Standing.BEHIND)
        else:
            self._set(number, Standing.AHEAD)

    @contextmanager
    def _running(self, number: int) -> Iterator[RunHeat]:
        """Start a system, and keep all that its runs tell."""
        with self.open_system(number) as run_heat:

            def noted(rate: float, seed: int, *, deadline_s: float = math.inf, gives_up: bool = True) -> Heat:
                heat = run_heat(rate, seed, deadline_s=deadline_s, gives_up=gives_up)
                entrant = self._entrant(number)
                self._entrants[number] = replace(entrant, heats=(*entrant.heats, heat))
                return heat

            yield noted

    def _by_seed(self, number: int) -> dict[int, Found]:
        return {found.seed: found for found in self._entrant(number).found}

    def _entrant(self, number: int) -> Entrant:
        return self._entrants.get(number) or Entrant(number)

    def _add(self, number: int, found: Found) -> None:
        entrant = self._entrant(number)
        self._entrants[number] = replace(entrant, found=(*entrant.found, found))

    def _set(self, number: int, standing: Standing) -> None:
        self._entrants[number] = replace(self._entrant(number), standing=standing)
        self.on_standing(number, standing)
