"""What a planner found: the best placements with their figures, and why others lose. Times in seconds."""

from typing import Final

import msgspec

from disagg.base.config import Placement
from disagg.measure.slo import SloTarget
from disagg.measure.statistics import Estimate, Share
from disagg.placement.composition import Family

CORE: Final = "core"
"""The kind of device of a plan for one host."""


class PlannedInstance(msgspec.Struct, frozen=True, kw_only=True):
    """Equal instances of a placement. ``goodput`` is that of one in its phase alone, in requests/s.

    None where it was not simulated alone."""

    role: str
    kind: str
    count: int
    tensor_parallel: int
    pipeline_parallel: int
    batching: str
    num_threads: int | None
    goodput: float | None


class PlannedPlacement(msgspec.Struct, frozen=True, kw_only=True):
    """A placement with what was found of it. Rates in requests/s; None where nothing is known."""

    words: str
    family: Family
    instances: tuple[PlannedInstance, ...]
    placement: Placement
    num_units: int
    """Units that serve among themselves; ``unit_devices`` each."""
    num_devices: int
    goodput: Estimate
    """Of the whole placement: of one unit, as simulated, times the units."""
    goodput_per_device: Estimate
    price_per_hour: float | None
    watts: float | None
    goodput_per_dollar: float | None
    """Requests/s for each dollar an hour."""
    goodput_per_watt: float | None
    bottleneck: str
    attainment: float
    ttft_p90_s: float
    tpot_p90_s: float
    objective_costs: dict[str, float]
    """Part of the requests that each objective alone loses at the goodput."""


class LosingPlacement(msgspec.Struct, frozen=True, kw_only=True):
    """An alternative that somebody might have taken, and why it is not the answer."""

    words: str
    reason: str


class PlannedCurve(msgspec.Struct, frozen=True, kw_only=True):
    """Attainment of a placement over ``rate per device`` (requests/s), or over ``SLO scale`` at the best's goodput."""

    words: str
    over: str
    x: tuple[float, ...]
    attainment: tuple[Share, ...]


class PromptShift(msgspec.Struct, frozen=True, kw_only=True):
    """The best of the judged placements when all prompts are ``factor`` times as long; goodput in requests/s."""

    factor: float
    best: str
    is_same: bool
    goodput_per_device: float
    chosen_per_device: float
    """What the plan's answer reaches then."""


class RateShift(msgspec.Struct, frozen=True, kw_only=True):
    """The best placement for another target rate, in requests/s, by its instances' goodputs alone."""

    rate: float
    best: str
    num_devices: int
    is_reached: bool
    has_same_instances: bool
    """Whether it is made of instances like those of the answer, more or fewer."""


class OneRouter(msgspec.Struct, frozen=True, kw_only=True):
    """The best placement as it is written, behind one router: requests/s that were asked of it, and that it serves.

    One router hands over from any unit to any other, over the links between them, and nobody's queue is empty beside
    another's. A plan adds up units, each with a router of its own.
    """

    asked: float
    served: float

    @property
    def is_as_predicted(self) -> bool:
        """Whether it serves what its units serve apart."""
        return self.served >= self.asked


class SearchEffort(msgspec.Struct, frozen=True, kw_only=True):
    """What the search did. ``is_complete`` is False when it was stopped."""

    num_choices: int
    """Instances that fit the model, over all roles and parallelisms."""
    num_refused: int
    num_ruled_out: int
    """By bounds."""
    num_compositions: int
    num_searches: int
    """Goodput searches that were simulated, of ``num_runs`` runs."""
    num_runs: int
    is_complete: bool


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The best placements, best first, and what speaks for the first."""

    model: str
    workload: str
    target: SloTarget
    target_rate: float | None
    placements: tuple[PlannedPlacement, ...]
    losing: tuple[LosingPlacement, ...]
    effort: SearchEffort
    behind_one_router: OneRouter | None = None
    """None where the best is one unit, and was simulated as it is written."""
    curves: tuple[PlannedCurve, ...] = ()
    rate_shifts: tuple[RateShift, ...] = ()
    prompt_shifts: tuple[PromptShift, ...] = ()
    notes: tuple[str, ...] = ()
    """Of what it is made of, what is an estimate."""

    @property
    def best(self) -> PlannedPlacement:
        """The answer."""
        return self.placements[0]
