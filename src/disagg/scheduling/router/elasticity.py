"""How a deployment changes by itself: autoscaling, and another placement when the workload has moved. Pure."""

import math
from typing import Final, assert_never

from disagg.base.elastic_settings import Replan
from disagg.scheduling.dispatch.dispatcher import Dispatcher
from disagg.scheduling.dispatch.events import ChangeRole, Drain
from disagg.scheduling.dispatch.state import InstanceState
from disagg.scheduling.replan.placements import changes_towards
from disagg.scheduling.replan.replanner import Replanner
from disagg.scheduling.router.autoscaler import Autoscaler
from disagg.scheduling.router.elastic_view import ElasticView
from disagg.scheduling.router.header import RouterHeader, RouterPart
from disagg.scheduling.router.inputs import Planned, PlanningFailed, TenantsReported, WorkloadReported
from disagg.scheduling.router.membership import Membership
from disagg.scheduling.router.outputs import (
    AddInstance,
    AskForPlan,
    ChangeWanted,
    PlanDecided,
    ReportTenants,
    ReportWorkload,
    ScalingDecided,
)
from disagg.scheduling.router.workload_reporter import REPORT_S, WorkloadReporter

TENANTS_S: Final = 0.05
"""Between two reports of tenants: as instances tell their loads."""

AnyReport = ReportWorkload | ReportTenants
AnyChange = ScalingDecided | PlanDecided | AskForPlan | AddInstance | AnyReport | ChangeWanted | Drain | ChangeRole
"""What is decided, and what follows from it: outputs of the router's core, and commands to it."""
AnyElasticNews = Planned | PlanningFailed | WorkloadReported | TenantsReported


class Elasticity:
    """Asks both rules, and keeps one from undoing at once what the other did."""

    def __init__(self, header: RouterHeader, dispatcher: Dispatcher) -> None:
        settings, scheduler = header.settings, header.scheduler
        self._is_keeper = header.part is RouterPart.KEEPER
        self._window, self._experience = dispatcher.turns.workload, dispatcher.turns.experience
        self._scaling = Autoscaler(settings, scheduler, self._window)
        self._replanner = Replanner(settings, scheduler, self._window, self._experience)

    @property
    def view(self) -> ElasticView:
        """What was seen and decided last."""
        return ElasticView(scaling=self._scaling.views, plan=self._replanner.last, plans=self._replanner.counts)

    @property
    def due_s(self) -> float:
        """When to review next."""
        return self._scaling.due_s

    def expect_work(self, now: float) -> None:
        """A sequence arrives."""
        self._scaling.expect_work(now)

    def review(self, members: Membership, now: float, *, has_work: bool) -> list[AnyChange]:
        """Return what is decided at a review that was due."""
        return self._by_whom([*self._scaling.review(members, now, has_work=has_work)])

    def look(self, members: Membership) -> list[AnyChange]:
        """Return a question for a planner, when the workload has moved."""
        asked = self._replanner.look(members)
        return [] if asked is None else [asked]

    def hear(self, news: AnyElasticNews, members: Membership, now: float) -> list[AnyChange]:
        """Return what follows from what a planner, or another router, said."""
        match news:
            case WorkloadReported(router=router, report=report):
                self._window.merge(router, report)
                self._experience.others_handed_over(report.handed_over)
                self._scaling.expect_work(now)
                return self.look(members)
            case PlanningFailed():
                self._replanner.gave_up()
                return []
            case TenantsReported():
                return []  # who keeps the fleet has no sequences, and who is alone hears of no other
            case Planned():
                return self._by_whom(self._weigh(news, members, now))
            case _:
                assert_never(news)

    def _weigh(self, news: Planned, members: Membership, now: float) -> list[AnyChange]:
        """Decide on a planner's answer. Of those that may be flipped, who holds least is."""
        decided = self._replanner.decide(news.answer)
        if not decided.acts:
            return [decided]
        self._scaling.rest(now)
        ready = [member for member in members if member.state is InstanceState.READY and not member.is_leaving]
        ready.sort(key=lambda member: member.entry.num_held)
        flips, joins = changes_towards(decided.best, [(member.instance, member.role) for member in ready])
        return [decided, *flips, *(AddInstance(role=role) for role in joins)]

    def _by_whom(self, changes: list[AnyChange]) -> list[AnyChange]:
        """Leave to whoever tells the followers what they have a part in."""
        if not self._is_keeper:
            return changes
        return [ChangeWanted(command=one) if isinstance(one, Drain | ChangeRole) else one for one in changes]


class FollowedElasticity:
    """Stands in the place of ``Elasticity`` where it is decided elsewhere: reports what that goes by.

    It also tells the other routers what is here of those who share the server, and hears it of them.
    """

    def __init__(self, header: RouterHeader, dispatcher: Dispatcher) -> None:
        self._tells_workload, self._tells_tenants = header.settings.watches_workload, header.settings.predicts
        tells_samples = header.settings.replan is not Replan.OFF
        turns = dispatcher.turns
        self._reporter = WorkloadReporter(turns.workload, turns.experience, tells_samples=tells_samples)
        self._room = turns.room
        if self._tells_tenants:
            self._room.news()  # from now on it notes what is served
        self.view = ElasticView()
        self._workload_due_s = self._tenants_due_s = math.inf

    @property
    def due_s(self) -> float:
        """When to report next."""
        return min(self._workload_due_s, self._tenants_due_s)

    def expect_work(self, now: float) -> None:
        """A sequence arrives."""
        if self._tells_workload:
            self._workload_due_s = min(self._workload_due_s, now + REPORT_S)
        if self._tells_tenants:
            self._tenants_due_s = min(self._tenants_due_s, now + TENANTS_S)

    def review(self, members: Membership, now: float, *, has_work: bool) -> list[AnyChange]:
        """Return reports that are due, where there is something to tell."""
        changes: list[AnyChange] = []
        if now >= self._workload_due_s:
            self._workload_due_s = now + REPORT_S if has_work else math.inf
            if (report := self._reporter.report()) is not None:
                changes.append(ReportWorkload(report=report))
        if now >= self._tenants_due_s:
            self._tenants_due_s = now + TENANTS_S if has_work else math.inf
            changes.append(ReportTenants(shares=self._room.news()))
        return changes

    def look(self, members: Membership) -> list[AnyChange]:
        """Return nothing: others look."""
        return []

    def hear(self, news: AnyElasticNews, members: Membership, now: float) -> list[AnyChange]:
        """Take what other routers say; nobody else was asked."""
        if isinstance(news, TenantsReported):
            self._room.hear(news.router, news.shares)
        return []


def elasticity_of(header: RouterHeader, dispatcher: Dispatcher) -> Elasticity | FollowedElasticity:
    """Return what decides in a router, or what stands for it."""
    follows = header.part is RouterPart.FOLLOWER
    return FollowedElasticity(header, dispatcher) if follows else Elasticity(header, dispatcher)
