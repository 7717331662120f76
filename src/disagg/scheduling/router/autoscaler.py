"""Adds and removes instances within the bounds of each role: asks the rule, and says who comes and who goes. Pure."""

import math
from collections.abc import Sequence
from typing import Final

from disagg.base.config import RouterSettings, SchedulerSettings
from disagg.base.errors import ConfigurationError
from disagg.base.request import Role
from disagg.scheduling.dispatch.events import Drain
from disagg.scheduling.dispatch.state import InstanceState
from disagg.scheduling.dispatch.workload import WorkloadWindow
from disagg.scheduling.router.demand import Demand, demand_of
from disagg.scheduling.router.membership import Member, Membership
from disagg.scheduling.router.outputs import AddInstance, ScalingDecided
from disagg.scheduling.router.scaling import Attainment, ScalingPolicy, ScalingView

REVIEW_S: Final = 1.0
_GONE = InstanceState.GONE


class Autoscaler:
    """Reviews the roles that have a range, every ``REVIEW_S`` while there is something to review."""

    def __init__(self, settings: RouterSettings, scheduler: SchedulerSettings, window: WorkloadWindow) -> None:
        self._policies = {role: ScalingPolicy(bounds) for role, bounds in settings.ranges.items()}
        self._objectives = scheduler.objectives
        if self._policies and self._objectives.ttft_s is None and self._objectives.tpot_s is None:
            raise ConfigurationError(
                "--autoscale goes by the predicted attainment of objectives, and there are none: give them with --slo, "
                "such as --slo ttft=500ms,tpot=50ms"
            )
        self._window = window
        self._last_change = dict.fromkeys(self._policies, "")
        self._num_added = dict.fromkeys(self._policies, 0)
        self._num_removed = dict.fromkeys(self._policies, 0)
        self.views: tuple[ScalingView, ...] = ()
        """The roles as they were seen last."""
        self.due_s = math.inf
        """When to review next."""

    def expect_work(self, now: float) -> None:
        """There is something to do: see that it is reviewed."""
        if self._policies and math.isinf(self.due_s):
            self.due_s = now + REVIEW_S

    def rest(self, now: float) -> None:
        """Somebody else has changed the placement: see first what comes of it."""
        for policy in self._policies.values():
            policy.rest(now)

    def review(self, members: Membership, now: float, *, has_work: bool) -> list[ScalingDecided | AddInstance | Drain]:
        """Return what is decided now, and what follows from it.

        Without work the reviews go on until no role has more instances than it needs.
        """
        decided: list[ScalingDecided | AddInstance | Drain] = []
        views = []
        is_idle = not has_work and not any(member.entry.num_held for member in members)
        for role, policy in self._policies.items():
            own = [member for member in members if member.role is role and not _leaves(member)]
            demand = demand_of(role, [member.entry for member in members], self._window, now)
            attainment = None if demand is None else self._attainment(demand)
            is_settled = all(member.state is InstanceState.READY or member.state is _GONE for member in own)
            is_behind = demand is not None and demand.is_behind(len(own), self._objectives)
            wanted = policy.review(len(own), attainment, now, is_behind=is_behind, is_settled=is_settled)
            if wanted != len(own):
                decision = self._decision(role, len(own), wanted, demand)
                self._note(decision)
                decided += (decision, *_carry_out(role, own, wanted))
            is_idle = is_idle and wanted == policy.bounds.fewest == len(own)
            views.append(self._view(role, policy, len(own), demand))
        self.views = tuple(views)
        self.due_s = math.inf if is_idle else now + REVIEW_S
        return decided

    def _attainment(self, demand: Demand) -> Attainment:
        best = demand.best_attainment(self._objectives)
        return lambda count: demand.attainment(count, self._objectives) / best if best > 0 else 1.0

    def _predicted(self, demand: Demand | None, count: int) -> float | None:
        return None if demand is None or count < 1 else demand.attainment(count, self._objectives)

    def _decision(self, role: Role, count: int, wanted: int, demand: Demand | None) -> ScalingDecided:
        return ScalingDecided(
            role=role,
            count=count,
            wanted=wanted,
            attainment=self._predicted(demand, count),
            attainment_then=self._predicted(demand, wanted),
        )

    def _note(self, decision: ScalingDecided) -> None:
        self._last_change[decision.role] = decision.words
        self._num_added[decision.role] += max(0, decision.wanted - decision.count)
        self._num_removed[decision.role] += max(0, decision.count - decision.wanted)

    def _view(self, role: Role, policy: ScalingPolicy, count: int, demand: Demand | None) -> ScalingView:
        return ScalingView(
            role=role.value,
            count=count,
            fewest=policy.bounds.fewest,
            most=policy.bounds.most,
            attainment=self._predicted(demand, count),
            attainment_with_fewer=self._predicted(demand, count - 1),
            last_change=self._last_change[role],
            num_added=self._num_added[role],
            num_removed=self._num_removed[role],
        )


def _leaves(member: Member) -> bool:
    return member.is_leaving or member.entry.is_cordoned


def _carry_out(role: Role, own: Sequence[Member], wanted: int) -> list[AddInstance | Drain]:
    """Return what brings the number about: of those that go, who cannot serve first, then who holds least."""
    if wanted > len(own):
        return [AddInstance(role=role)] * (wanted - len(own))
    order = {member.instance: number for number, member in enumerate(own)}
    going = sorted(
        own,
        key=lambda member: (member.state is not _GONE, member.entry.num_held, -order[member.instance]),
    )
    return [Drain(instance=member.instance, leave=True) for member in going[: len(own) - wanted]]
