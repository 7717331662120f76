"""How a deployment changes by itself: autoscaling, and another placement when the workload has moved. Pure."""

from disagg.base.config import RouterSettings, SchedulerSettings
from disagg.scheduling.dispatch.dispatcher import Dispatcher
from disagg.scheduling.dispatch.events import ChangeRole, Drain
from disagg.scheduling.dispatch.state import InstanceState
from disagg.scheduling.replan.placements import changes_towards
from disagg.scheduling.replan.replanner import Replanner
from disagg.scheduling.router.autoscaler import Autoscaler
from disagg.scheduling.router.inputs import Planned, PlanningFailed
from disagg.scheduling.router.membership import Membership
from disagg.scheduling.router.outputs import AddInstance, AskForPlan, PlanDecided, ScalingDecided
from disagg.scheduling.router.scaling import ScalingView

AnyChange = ScalingDecided | PlanDecided | AskForPlan | AddInstance | Drain | ChangeRole
"""What is decided, and what follows from it: outputs of the router's core, and commands to it."""


class Elasticity:
    """Asks both rules, and keeps one from undoing at once what the other did."""

    def __init__(self, settings: RouterSettings, scheduler: SchedulerSettings, dispatcher: Dispatcher) -> None:
        self._scaling = Autoscaler(settings, scheduler, dispatcher.workload)
        self._replanner = Replanner(settings, scheduler, dispatcher.workload, dispatcher.experience)

    @property
    def scaling(self) -> tuple[ScalingView, ...]:
        """The roles that are scaled, as they were seen last."""
        return self._scaling.views

    @property
    def last_plan(self) -> PlanDecided | None:
        """What was decided last of the placement."""
        return self._replanner.last

    @property
    def due_s(self) -> float:
        """When to review next."""
        return self._scaling.due_s

    def expect_work(self, now: float) -> None:
        """A sequence arrives."""
        self._scaling.expect_work(now)

    def review(self, members: Membership, now: float, *, has_work: bool) -> list[AnyChange]:
        """Return what is decided at a review that was due."""
        return [*self._scaling.review(members, now, has_work=has_work)]

    def look(self, members: Membership) -> list[AnyChange]:
        """Return a question for a planner, when the workload has moved."""
        asked = self._replanner.look(members)
        return [] if asked is None else [asked]

    def hear(self, news: Planned | PlanningFailed, members: Membership, now: float) -> list[AnyChange]:
        """Return what follows from what a planner said. Of those that may be flipped, who holds least is."""
        if isinstance(news, PlanningFailed):
            self._replanner.gave_up()
            return []
        decided = self._replanner.decide(news.answer)
        if not decided.acts:
            return [decided]
        self._scaling.rest(now)
        ready = [member for member in members if member.state is InstanceState.READY and not member.is_leaving]
        ready.sort(key=lambda member: member.entry.num_sequences)
        flips, joins = changes_towards(decided.best, [(member.instance, member.role) for member in ready])
        return [decided, *flips, *(AddInstance(role=role) for role in joins)]
