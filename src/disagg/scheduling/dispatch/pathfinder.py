"""Which instance a sequence is given to, and when: by predicted latency, or by loads in tokens within strict roles.

By predictions, an instance is given prompts ahead of its work up to ``AHEAD_S``. The others wait in the router, in
order, and are given to whoever is predicted best when their turn comes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from disagg.base.config import RouterSettings
from disagg.base.objectives import Objectives
from disagg.base.request import Role
from disagg.scheduling.dispatch.choice import choose_decode, choose_start
from disagg.scheduling.dispatch.experience import Experience
from disagg.scheduling.dispatch.forecast import Forecast
from disagg.scheduling.dispatch.forecaster import Forecaster
from disagg.scheduling.dispatch.paths import best_path, forecast_paths, open_to
from disagg.scheduling.dispatch.state import InstanceEntry, SequenceEntry

AHEAD_S: Final = 0.25
"""Seconds of prefill that an instance has at hand, so that it never waits for the router."""


@dataclass(frozen=True, slots=True)
class Start:
    """Where a sequence starts; by predictions with those of the path, and of the best other one."""

    instance: InstanceEntry
    hands_over: bool
    chosen: Forecast | None = None
    other: Forecast | None = None


@dataclass(frozen=True, slots=True)
class HeldBack:
    """The sequence's best instance has enough to do: look again at ``until_s``, or when it has done something."""

    until_s: float


class Pathfinder:
    """Chooses among the instances of a fleet. ``objectives`` are those of sequences that bring none."""

    def __init__(self, settings: RouterSettings, objectives: Objectives) -> None:
        self.predicts = settings.predicts
        self.experience = Experience()
        self._strict_roles = settings.strict_roles
        self._objectives = objectives

    def start(self, instances: Sequence[InstanceEntry], sequence: SequenceEntry, now: float) -> Start | HeldBack | None:
        """Return where a queued sequence starts, or that it is held back; None when no instance can take it now."""
        if not self.predicts:
            instance = choose_start(instances, sequence)
            return None if instance is None else Start(instance, instance.role is Role.PREFILL)
        forecaster = self.forecaster(instances, now)
        # A sequence that lost an instance need not wait for one of the right role.
        strict_roles = self._strict_roles and not sequence.losses
        forecasts = forecast_paths(instances, sequence, forecaster, strict_roles=strict_roles)
        objectives = forecaster.objectives_of(sequence)
        num_later_tokens = forecaster.num_answer_tokens(sequence)
        chosen = best_path(forecasts, objectives, num_later_tokens)
        if chosen is None:
            return None
        instance = next(entry for entry in instances if entry.instance == chosen.path.prefill)
        ahead_s = forecaster.backlog_s(instance)
        if ahead_s > AHEAD_S:
            return HeldBack(now + ahead_s - AHEAD_S)
        other = best_path((one for one in forecasts if one is not chosen), objectives, num_later_tokens)
        return Start(instance, chosen.path.hands_over, chosen, other)

    def adopt(self, instances: Sequence[InstanceEntry], sequence: SequenceEntry, now: float) -> InstanceEntry | None:
        """Return the decode instance that goes on with an offered sequence; None when none can take it now."""
        if not self.predicts:
            return choose_decode(instances, sequence)
        forecaster = self.forecaster(instances, now)
        return min(
            open_to(instances, sequence, Role.DECODE, hand_over=False),
            key=lambda entry: forecaster.later_token_s(entry, sequence, forecaster.hand_over_s(sequence)),
            default=None,
        )

    def forecaster(self, instances: Sequence[InstanceEntry], now: float) -> Forecaster:
        """Return what predicts for the instances as they are now."""
        return Forecaster(instances, self.experience, self._objectives, now)
