"""Which way a sequence goes through the deployment: the path with the best predicted TTFT and TPOT.

Strict roles allow paths from a prefill to a decode instance, and all on a colocated one. Where roles are leanings any
instance may do everything (TaiChi, DynaServe: between disaggregation and aggregation).

A path is judged by how many would miss an objective by it: the sequence itself, and those who decode there already and
keep theirs now. Among equals by the worst of three ratios: its TTFT and its TPOT to the sequence's objectives, and the
TPOT that it leaves to the others to theirs. All that are good enough count as equal: then the role decides, and time.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from disagg.base.objectives import Objectives
from disagg.base.request import Role
from disagg.scheduling.dispatch.choice import open_to
from disagg.scheduling.dispatch.forecast import Forecast, Path
from disagg.scheduling.dispatch.forecaster import Forecaster
from disagg.scheduling.dispatch.prefixes import holds_most
from disagg.scheduling.dispatch.state import InstanceEntry, SequenceEntry

GOOD_ENOUGH: Final = 0.8
"""Part of an objective up to which predictions, which have their errors, count as equally good."""
_LEANING: Final = 1.25
"""How much slower a path within the roles may be, where no objective says what is good enough."""

CachedTokens = Callable[[InstanceEntry, SequenceEntry], int]
"""How many tokens at the beginning of a sequence an instance need not compute."""


def no_cache(entry: InstanceEntry, sequence: SequenceEntry) -> int:
    """Return 0: nothing is known of what instances keep."""
    return 0


def forecast_paths(
    instances: Sequence[InstanceEntry],
    sequence: SequenceEntry,
    forecaster: Forecaster,
    *,
    strict_roles: bool,
    cached: CachedTokens = no_cache,
    append_turns: bool = False,
) -> list[Forecast]:
    """Return what the paths that are open to the sequence now are predicted to bring.

    Of the paths on which it is handed over, those to the decode instance that is predicted to be quickest. With
    ``append_turns``, strict roles let a decode instance go on by itself with what it holds most of.
    """
    forecasts = []
    prefill = open_to(instances, sequence, Role.PREFILL, hand_over=True)
    decode = open_to(instances, sequence, Role.DECODE, hand_over=False)
    if prefill and decode and not sequence.ends_at_first_token:
        for entry in prefill:
            num_tokens = sequence.num_tokens - cached(entry, sequence)
            ttft_s = forecaster.first_token_s(entry, sequence, num_tokens)
            targets = [(forecaster.handed_over_token_s(one, sequence, entry.instance, ttft_s), one) for one in decode]
            tpot_s, target = min(targets, key=lambda pair: pair[0])
            harm = forecaster.harm(target, 0, sequence.num_tokens)
            harms = forecaster.harm(entry, num_tokens, 0).and_also(harm)
            path = Path(entry.instance, target.instance)
            forecasts.append(
                Forecast(
                    path=path,
                    follows_roles=True,
                    ttft_s=ttft_s,
                    tpot_s=tpot_s,
                    hand_over_s=forecaster.hand_over_s(sequence, entry.instance, target),
                    others_tpot_s=harms.tpot_s,
                    num_harmed=harms.num_late,
                )
            )
    for role in Role:
        is_role_s = role is Role.COLOCATED or (role is Role.PREFILL and sequence.ends_at_first_token)
        if strict_roles and not is_role_s and not (append_turns and role is Role.DECODE):
            continue
        for entry in open_to(instances, sequence, role, hand_over=False):
            appends = append_turns and role is Role.DECODE and holds_most(entry, sequence)
            follows_roles = is_role_s or appends
            if strict_roles and not follows_roles:
                continue
            num_tokens = sequence.num_tokens - cached(entry, sequence)
            harms = forecaster.harm(entry, num_tokens, sequence.num_tokens)
            ttft_s = forecaster.first_token_s(entry, sequence, num_tokens)
            forecasts.append(
                Forecast(
                    path=Path(entry.instance, entry.instance),
                    follows_roles=follows_roles,
                    ttft_s=ttft_s,
                    tpot_s=forecaster.later_token_s(entry, sequence, ahead_s=ttft_s),
                    others_tpot_s=harms.tpot_s,
                    num_harmed=harms.num_late,
                )
            )
    return forecasts


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a path is judged by: the sequence's objectives, those of the others, and the tokens after the first."""

    objectives: Objectives
    others: Objectives
    num_later_tokens: float
    waited_s: float = 0.0
    """Since the sequence's arrival: counts as TTFT."""


def best_path(forecasts: Iterable[Forecast], wanted: Wanted) -> Forecast | None:
    """Return the forecast to go by; None where there is none. Ties go to the first."""
    return min(forecasts, key=lambda one: _order(one, wanted), default=None)


def stress(forecast: Forecast, wanted: Wanted) -> float | None:
    """Return the worst ratio of what is predicted to its objective; None where there is no objective."""
    ratios = [
        predicted_s / objective_s
        for predicted_s, objective_s in (
            (wanted.waited_s + forecast.ttft_s, wanted.objectives.ttft_s),
            (forecast.tpot_s, wanted.objectives.tpot_s),
            (forecast.others_tpot_s, wanted.others.tpot_s),
        )
        if objective_s is not None
    ]
    return max(ratios, default=None)


def _order(forecast: Forecast, wanted: Wanted) -> tuple[int, float, bool, float]:
    total_s = forecast.ttft_s + wanted.num_later_tokens * forecast.tpot_s
    worst = stress(forecast, wanted)
    if worst is None:
        return (0, total_s * (1.0 if forecast.follows_roles else _LEANING), not forecast.follows_roles, total_s)
    objectives = wanted.objectives
    is_late = (objectives.ttft_s is not None and wanted.waited_s + forecast.ttft_s > objectives.ttft_s) or (
        objectives.tpot_s is not None and forecast.tpot_s > objectives.tpot_s
    )
    return (is_late + forecast.num_harmed, max(worst, GOOD_ENOUGH), not forecast.follows_roles, total_s)
