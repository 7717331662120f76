"""What a planner is asked when the workload has moved, and what it answers: all that it needs, as data."""

import msgspec

from disagg.base.config import RouterSettings, SchedulerSettings
from disagg.base.messages import StepCosts
from disagg.scheduling.dispatch.sequence_sample import SequenceSample
from disagg.scheduling.replan.placements import RoleCounts


class PlanQuestion(msgspec.Struct, frozen=True, kw_only=True):
    """Which of the placements serves requests like these best within ``horizon_s`` from now, the change included?

    The first of ``placements`` is the present one. An instance that joins takes requests after ``join_s``. KV blocks of
    n tokens travel ``hand_over_s + n * hand_over_token_s``.
    """

    placements: tuple[RoleCounts, ...]
    requests: tuple[SequenceSample, ...]
    router: RouterSettings
    scheduler: SchedulerSettings
    prefill_costs: StepCosts
    decode_costs: StepCosts
    pool_tokens: int
    hand_over_s: float
    hand_over_token_s: float
    join_s: float
    horizon_s: float


class ForecastPlacement(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one placement: the part of the requests that keep their objectives.

    ``num_gained`` keep them here and not where nothing is changed, ``num_lost`` the other way round.
    """

    counts: RoleCounts
    attainment: float
    num_gained: int = 0
    num_lost: int = 0


class PlanAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The placements of the question in its order, and how many requests each of them was given."""

    placements: tuple[ForecastPlacement, ...]
    num_requests: int
