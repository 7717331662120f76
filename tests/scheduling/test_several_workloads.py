"""What several routers report, put together: the same workload, and the same decisions, as if all had come to one."""

import heapq
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from instance_facts import FACTS

from disagg.base.config import RouterSettings, SchedulerSettings
from disagg.base.elastic_settings import Replan
from disagg.base.ids import Epoch, InstanceId, RequestId, RouterId
from disagg.base.message_fields import PROTOCOL_VERSION
from disagg.base.messages import CostsLearned, InstanceLoad, LoadReport, Ready, StepCosts
from disagg.base.objectives import Objectives
from disagg.base.request import Role
from disagg.base.router_messages import ForeignLoad
from disagg.scheduling.dispatch.actions import SendGenerate
from disagg.scheduling.dispatch.events import ChangeRole, Drain, Progress, SequenceArrived, TokensEmitted
from disagg.scheduling.dispatch.experience import Experience
from disagg.scheduling.dispatch.state import InstanceEntry, SequenceEntry
from disagg.scheduling.dispatch.workload import WorkloadCounts, WorkloadWindow
from disagg.scheduling.replan.placements import RoleCounts
from disagg.scheduling.replan.question import ForecastPlacement, PlanAnswer
from disagg.scheduling.router.core import RouterCore
from disagg.scheduling.router.elastic_view import PlanCounts
from disagg.scheduling.router.header import RouterHeader, RouterPart
from disagg.scheduling.router.inputs import AnyRouterInput, InstanceSaid, Planned, WorkloadReported
from disagg.scheduling.router.outputs import (
    AddInstance,
    AnyRouterOutput,
    ChangeWanted,
    ReportWorkload,
    ScalingDecided,
    StopInstance,
)
from disagg.scheduling.router.workload_reporter import WorkloadReporter
from disagg.scheduling.step.actions import WakeAt
from disagg.scheduling.step.events import Tick

C0, C1 = (InstanceId(f"colocated-{number}") for number in range(2))
NAMES = (RouterId("0.1"), RouterId("1.1"))
OBJECTIVES = Objectives(ttft_s=2.0, tpot_s=0.05)
COSTS = StepCosts(step_s=0.02, token_s=2e-2, square_s=0.0, prefill_s=0.0, context_s=1e-5, decode_s=5e-4)


def core(part: RouterPart, **settings: Any) -> RouterCore:
    """A router whose two instances are ready and have told what their steps cost."""
    made = RouterCore(
        RouterHeader(
            instances=dict.fromkeys((C0, C1), Role.COLOCATED),
            settings=RouterSettings(autoscale="colocated=1..4", request_timeout_s=1e6, **settings),
            scheduler=SchedulerSettings(objectives=OBJECTIVES),
            watches_silence=False,
            part=part,
        )
    )
    for name in (C0, C1):
        ready = Ready(version=PROTOCOL_VERSION, instance=name, role=Role.COLOCATED, incarnation="1", facts=FACTS)
        learned = CostsLearned(instance=name, incarnation="1", costs=COSTS, num_prefill_steps=9, num_decode_steps=9)
        for message in (ready, learned):
            made.handle(InstanceSaid(instance=name, message=message), 0.0)
    return made


@dataclass
class Visited:
    """A router, what it has decided and reported, and where its sequences are."""

    core: RouterCore
    holders: dict[RequestId, InstanceId] = field(default_factory=dict)
    decided: list[AnyRouterOutput] = field(default_factory=list)
    reports: list[ReportWorkload] = field(default_factory=list)

    def tell(self, one: AnyRouterInput, now: float) -> list[AnyRouterOutput]:
        outputs = self.core.handle(one, now)
        for output in outputs:
            match output:
                case SendGenerate(request_id=request_id, instance=instance):
                    self.holders[request_id] = instance
                case ScalingDecided() | AddInstance():
                    self.decided.append(output)
                case ReportWorkload():
                    self.reports.append(output)
        return outputs

    def arrive(self, name: RequestId, num_tokens: int, now: float) -> None:
        self.tell(SequenceArrived(request_id=name, epoch=Epoch(0), num_tokens=num_tokens, max_total_tokens=90), now)

    def emit(self, name: RequestId, count: int, now: float, *, is_last: bool = True) -> None:
        progress = (Progress(name, Epoch(0), count, is_last),)
        self.tell(TokensEmitted(instance=self.holders[name], progress=progress), now)

    def load(self, instance: InstanceId) -> ForeignLoad:
        """What others would be told that this router has put on an instance."""
        entry = self.core.members[instance].entry
        return ForeignLoad(
            num_sequences=entry.num_sequences,
            num_prefills=entry.num_prefills,
            prefill_tokens=entry.prefill_tokens,
            prefill_squares=entry.prefill_squares,
            num_decodes=entry.num_decodes,
            kv_tokens=entry.kv_tokens,
        )


LOADS = st.lists(
    st.tuples(st.floats(0.02, 2.0), st.integers(10, 60), st.integers(1, 20), st.floats(0.05, 3.0), st.integers(0, 1)),
    min_size=30,
    max_size=60,
)
"""Gap, tokens of prompt and answer, seconds until that, and which router it comes to."""


def decisions(load: list[tuple[float, int, int, float, int]], pace: float) -> list[AnyRouterOutput]:
    """Return what is decided in the end; the keeper and a router that has all sequences see the same on the way."""
    alone, keeper = Visited(core(RouterPart.ALONE)), Visited(core(RouterPart.KEEPER))
    followers = [Visited(core(RouterPart.FOLLOWER)) for _ in NAMES]
    for number, follower in enumerate(followers):  # sequences that never end: all reviews and reports are of one beat
        for router in (alone, follower):
            router.arrive(RequestId(f"long-{number}"), 10, 0.0)
    now, ends, beats = 0.0, list[tuple[float, int]](), iter(range(1, 10_000))
    beat = next(beats)

    def pass_until(time_s: float) -> None:
        nonlocal beat
        while min(beat, ends[0][0] if ends else beat) <= time_s:
            if ends and ends[0][0] < beat:
                end_s, number = heapq.heappop(ends)
                for router in (alone, followers[load[number][4]]):
                    router.emit(RequestId(str(number)), load[number][2], end_s)
                continue
            review(alone, keeper, followers, float(beat))
            beat = next(beats)

    for number, (gap_s, num_tokens, _, answer_s, whose) in enumerate(load):
        now += pace * gap_s
        pass_until(now)
        for router in (alone, followers[whose]):
            router.arrive(RequestId(str(number)), num_tokens, now)
        heapq.heappush(ends, (now + answer_s, number))
    pass_until(now + 20.0)
    assert keeper.decided == alone.decided
    return keeper.decided


@given(load=LOADS, pace=st.sampled_from([0.1, 0.3, 1.0, 3.0]))
@settings(max_examples=25, deadline=None)
def test_the_keeper_sees_and_decides_what_one_router_with_all_sequences_would(
    load: list[tuple[float, int, int, float, int]], pace: float
):
    decisions(load, pace)


def review(alone: Visited, keeper: Visited, followers: list[Visited], now: float) -> None:
    """A second is over: the routers report, and both who decide look at the deployment."""
    for name, follower in zip(NAMES, followers, strict=True):
        follower.tell(Tick(), now)
        assert not follower.decided
        for report in follower.reports:
            keeper.tell(WorkloadReported(router=name, report=report.report), now)
        follower.reports.clear()
    for instance in (C0, C1):
        report = LoadReport(instance=instance, incarnation="1", load=InstanceLoad(), foreign=alone.load(instance))
        keeper.tell(InstanceSaid(instance=instance, message=report), now)
    alone.tell(Tick(), now)
    keeper.tell(Tick(), now)
    if now > 1.0 and not alone.decided:
        assert keeper.core.elastic_view == alone.core.elastic_view


def test_both_add_an_instance_for_a_load_that_comes_to_both_routers():
    decided = decisions([(1.0, 60, 5, 0.1, number % 2) for number in range(120)], 0.3)
    assert [type(one) for one in decided[:2]] == [ScalingDecided, AddInstance]


def test_a_follower_reports_once_a_second_while_there_is_something_to_tell():
    follower = Visited(core(RouterPart.FOLLOWER))
    follower.arrive(RequestId("a"), 10, 5.0)
    assert WakeAt(time_s=6.0) in follower.tell(Tick(), 5.5)
    assert not follower.reports
    assert WakeAt(time_s=7.0) in follower.tell(Tick(), 6.0)
    (first,) = follower.reports
    assert [one.num_prompt_tokens for one in first.report.arrivals] == [10]
    assert follower.tell(Tick(), 7.0) == [WakeAt(time_s=8.0)], "nothing is new, and a sequence is under way"
    follower.emit(RequestId("a"), 3, 7.5)
    assert WakeAt(time_s=9.0) not in follower.tell(Tick(), 8.0), "nothing is under way"
    assert [one.num_tokens for one in follower.reports[-1].report.answers] == [3]


def test_what_the_keeper_decides_of_instances_is_left_to_who_tells_the_followers():
    keeper, passed = Visited(core(RouterPart.KEEPER)), WorkloadWindow()
    passed.arrived(10, 0.5)
    keeper.tell(WorkloadReported(router=NAMES[0], report=passed.news(WorkloadCounts())), 1.0)
    outputs = [output for second in range(2, 100) for output in keeper.tell(Tick(), float(second))]
    assert [one.command for one in outputs if isinstance(one, ChangeWanted)] == [Drain(instance=C1, leave=True)]
    assert not any(isinstance(one, StopInstance) for one in outputs), "others may have sequences there"
    (view,) = keeper.core.elastic_view.scaling
    assert (view.num_added, view.num_removed) == (0, 1)


def test_instances_that_a_plan_flips_are_left_to_who_tells_the_followers_too():
    keeper = Visited(core(RouterPart.KEEPER, replan=Replan.ACT))
    present = ForecastPlacement(counts=RoleCounts(colocated=2), attainment=0.5)
    better = ForecastPlacement(counts=RoleCounts(1, 1, 0), attainment=0.9, num_gained=80)
    outputs = keeper.tell(Planned(answer=PlanAnswer(placements=(present, better), num_requests=200)), 5.0)
    assert [one.command for one in outputs if isinstance(one, ChangeWanted)] == [
        ChangeRole(instance=C0, role=Role.PREFILL),
        ChangeRole(instance=C1, role=Role.DECODE),
    ]
    assert keeper.core.elastic_view.plans == PlanCounts(num_changed=1)
    assert keeper.core.members[C0].role is Role.COLOCATED, "until the command comes"


class TwoOfOne:
    """Sequences that two routers note, each its own, and one router all of them."""

    def __init__(self) -> None:
        self.one, self.merged, self.two = WorkloadWindow(), WorkloadWindow(), (WorkloadWindow(), WorkloadWindow())
        self.reporters = [WorkloadReporter(window, Experience(), tells_samples=True) for window in self.two]
        self.under_way: tuple[list[tuple[SequenceEntry, SequenceEntry]], ...] = ([], [])
        self.now = 0.0

    def arrive(self, whose: int, num_tokens: int, *, is_taken: bool) -> None:
        taken = (sequence(num_tokens, self.now), sequence(num_tokens, self.now))
        for window, entered in zip((self.one, self.two[whose]), taken, strict=True):
            window.arrived(num_tokens, self.now)
            if is_taken:
                window.take(entered)
        if is_taken:
            self.under_way[whose].append(taken)

    def go_on(self, whose: int, what: str, count: int) -> None:
        """Let a sequence start, bring tokens, come to its end, or be cancelled."""
        if not (own := self.under_way[whose]):
            return
        pair = own[count % len(own)]
        for window, entered in zip((self.one, self.two[whose]), pair, strict=True):
            if what == "start":
                window.started(entered, InstanceEntry(C0, Role.COLOCATED), self.now)
            if what in ("bring", "end"):
                entered.note_tokens(count, self.now)
                window.brought(entered)
            if what == "end":
                window.ended(entered, has_kept=count % 2 == 0)
        if what in ("end", "cancel"):
            own.remove(pair)

    def report(self, whose: int) -> None:
        if (told := self.reporters[whose].report()) is not None:
            self.merged.merge(NAMES[whose], told)


def sequence(num_tokens: int, now: float) -> SequenceEntry:
    arrived = SequenceArrived(request_id=RequestId("a"), epoch=Epoch(0), num_tokens=num_tokens, max_total_tokens=1000)
    return SequenceEntry.arrived(arrived, 0, now, 1e6)


STEPS = st.lists(
    st.tuples(
        st.floats(0.01, 0.5),
        st.integers(0, 1),
        st.sampled_from(["arrive", "refuse", "start", "bring", "end", "cancel", "report"]),
        st.integers(1, 50),
    ),
    min_size=1,
    max_size=80,
)


@given(steps=STEPS)
@settings(max_examples=60, deadline=None)
def test_reports_of_two_routers_add_up_to_the_workload_of_one(steps: list[tuple[float, int, str, int]]):
    story = TwoOfOne()
    for gap_s, whose, what, count in steps:
        story.now += gap_s
        if what in ("arrive", "refuse"):
            story.arrive(whose, count, is_taken=what == "arrive")
        elif what == "report":
            story.report(whose)
        else:
            story.go_on(whose, what, count)
    for whose in range(2):
        story.report(whose)
    one, merged, now = story.one, story.merged, story.now
    assert (merged.num_taken, merged.num_ended) == (one.num_taken, one.num_ended)
    assert merged.taken(0, one.num_taken) == one.taken(0, one.num_taken)
    assert list(merged.arrivals(now)) == list(one.arrivals(now))
    assert list(merged.starts(now)) == list(one.starts(now))
    assert (merged.answers, merged.span_s(now)) == (one.answers, one.span_s(now))


def test_hand_overs_of_all_routers_are_learned_from():
    here, there = Experience(), Experience()
    reporter = WorkloadReporter(WorkloadWindow(), there, tells_samples=True)
    for _ in range(1000):
        there.hand_over_ended(100, 0.5)
    told = reporter.report()
    assert told is not None
    here.others_handed_over(told.handed_over)
    assert abs(here.hand_over_s(100) - 0.5) < 1e-3
    assert reporter.report() is None
