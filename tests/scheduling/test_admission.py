"""Who waits in the router, whose turn it is, and what becomes of those who are predicted to come too late."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg.base.config import MAX_OVERTAKE_S, RouterSettings, SchedulerSettings
from disagg.base.ids import Epoch, InstanceId, RequestId
from disagg.base.messages import CostsLearned, StepCosts
from disagg.base.objectives import Objectives
from disagg.base.request import Role
from disagg.base.service_classes import Overload, ServiceClass
from disagg.base.tenants import TenantSettings
from disagg.scheduling.dispatch.actions import Degrade, Refuse, RefuseReason, SendGenerate
from disagg.scheduling.dispatch.dispatcher import Dispatcher
from disagg.scheduling.dispatch.events import (
    CostsKnown,
    InstanceUp,
    Progress,
    SequenceArrived,
    SequenceCancelled,
    TokensEmitted,
)
from disagg.scheduling.dispatch.state import SequenceEntry
from disagg.scheduling.dispatch.waiting_room import WaitingRoom

C = InstanceId("colocated-0")
COSTS = StepCosts(step_s=0.0, token_s=0.001, square_s=0.0, prefill_s=0.0, context_s=0.0, decode_s=0.0)


def waiting(name: str, tenant: str = "", order: int = 0, num_tokens: int = 100, priority: int = 0) -> SequenceEntry:
    return SequenceEntry(
        request_id=RequestId(name),
        epoch=Epoch(1),
        num_tokens=num_tokens,
        max_total_tokens=num_tokens + 10,
        priority=priority,
        order=order,
        arrived_s=0.0,
        deadline_s=1e9,
        tenant=tenant,
        rank=(priority, 0.0, order),
    )


class TestRoom:
    def serve_next(self, room: WaitingRoom) -> str:
        head = room.head()
        assert head is not None
        room.stop_waiting(head)
        room.served(head, num_input=head.num_tokens)
        return head.request_id

    def test_a_flood_of_one_tenant_lets_another_in_at_once(self) -> None:
        room = WaitingRoom({})
        for number in range(20):
            room.enter(waiting(f"flood{number}", "a", order=number))
        assert self.serve_next(room) == "flood0"
        room.enter(waiting("other", "b", order=20))
        assert "other" in {self.serve_next(room), self.serve_next(room)}

    def test_weights_divide_what_is_served(self) -> None:
        room = WaitingRoom({"a": TenantSettings(weight=3.0)})
        for number in range(40):
            room.enter(waiting(f"a{number}", "a", order=2 * number))
            room.enter(waiting(f"b{number}", "b", order=2 * number + 1))
        served = [self.serve_next(room)[0] for _ in range(40)]
        assert served.count("a") == pytest.approx(30, abs=1)

    def test_nobody_saves_up_by_staying_away(self) -> None:
        room = WaitingRoom({})
        for number in range(20):
            room.enter(waiting(f"a{number}", "a", order=number))
        for _ in range(10):
            self.serve_next(room)
        for number in range(10):
            room.enter(waiting(f"b{number}", "b", order=30 + number))
        assert sorted(self.serve_next(room)[0] for _ in range(4)) == ["a", "a", "b", "b"]

    def test_priority_goes_before_fairness(self) -> None:
        room = WaitingRoom({})
        room.enter(waiting("low", "a", order=0, priority=1))
        room.enter(waiting("high", "b", order=1, priority=-1))
        assert self.serve_next(room) == "high"

    @given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 2000)), min_size=1, max_size=60))
    @settings(max_examples=60, deadline=None)
    def test_all_are_served_and_whoever_waits_gets_his_share(self, arrivals: list[tuple[str, int]]) -> None:
        room = WaitingRoom({})
        for number, (tenant, size) in enumerate(arrivals):
            room.enter(waiting(f"{tenant}{number}", tenant, order=number, num_tokens=size))
        tokens = dict.fromkeys("abc", 0)
        num_waiting = Counter(tenant for tenant, _ in arrivals)
        while (head := room.head()) is not None:
            present = {name for name in "abc" if num_waiting[name]}
            num_waiting[head.tenant] -= 1
            room.stop_waiting(head)
            room.served(head, num_input=head.num_tokens)
            tokens[head.tenant] += head.num_tokens
            # VTC, theorem 4.4: the service of two that wait differs by what one request may bring, at most twice.
            if len(present) > 1:
                served = [tokens[name] for name in present]
                assert max(served) - min(served) <= 2 * 2000
            room.leave(head)
        assert len(room) == 0


class Story:
    """One colocated instance, a millisecond a prompt token, under a TTFT objective of a second."""

    def __init__(
        self,
        overload: Overload,
        tenants: dict[str, TenantSettings] | None = None,
        classes: dict[str, ServiceClass] | None = None,
    ) -> None:
        router = RouterSettings(overload=overload, tenants=tenants or {}, classes=classes or {})
        scheduler = SchedulerSettings(objectives=Objectives(ttft_s=1.0))
        self.dispatcher = Dispatcher({C: Role.COLOCATED}, router, scheduler)
        self.now = 100.0
        self.send(InstanceUp(instance=C, max_total_tokens=10_000))
        self.send(
            CostsKnown(
                lesson=CostsLearned(instance=C, incarnation="", costs=COSTS, num_prefill_steps=99, num_decode_steps=99)
            )
        )

    def send(self, event):
        actions = self.dispatcher.handle(event, self.now)
        self.dispatcher.validate()
        return actions

    def arrive(self, name: str, num_tokens: int = 300, **more):
        return self.send(
            SequenceArrived(
                request_id=RequestId(name),
                epoch=Epoch(1),
                num_tokens=num_tokens,
                max_total_tokens=num_tokens + 10,
                **more,
            )
        )

    def first_token(self, name: str):
        progress = Progress(RequestId(name), Epoch(1), 1, True)
        return self.send(TokensEmitted(instance=C, progress=(progress,)))

    @staticmethod
    def started(actions) -> list[str]:
        return [one.request_id for one in actions if isinstance(one, SendGenerate)]


class TestOverload:
    def test_what_would_miss_is_shed_and_told_when_to_come_again(self) -> None:
        story = Story(Overload.SHED)
        for name in "abc":
            assert not any(isinstance(one, Refuse) for one in story.arrive(name, num_tokens=250))
        (refusal,) = story.arrive("d", num_tokens=250)
        assert isinstance(refusal, Refuse)
        assert refusal.reason is RefuseReason.SHED
        assert "1.13 s" in refusal.detail
        # After that long the work before it has shrunk to what lets it keep its objective.
        assert refusal.retry_after_s == pytest.approx(0.5)
        story.now += 0.25
        story.first_token("a")
        story.now += 0.25
        assert not any(isinstance(one, Refuse) for one in story.arrive("d", num_tokens=250))

    def test_ten_times_too_much_leaves_the_queue_short_and_the_admitted_in_time(self) -> None:
        story = Story(Overload.SHED)
        arrived_s: dict[str, float] = {}
        ttft_s: list[float] = []
        running: list[str] = []
        num_shed = 0
        free_at_s = story.now
        for number in range(600):  # 33 a second, where the instance does 3.3
            story.now = 100.0 + number * 0.03
            while running and free_at_s <= story.now:
                name = running.pop(0)
                ttft_s.append(free_at_s - arrived_s[name])
                running += story.started(story.first_token(name))
                free_at_s += 0.3
            name = f"r{number}"
            arrived_s[name] = story.now
            actions = story.arrive(name)
            num_shed += any(isinstance(one, Refuse) for one in actions)
            if started := story.started(actions):
                free_at_s = max(free_at_s, story.now + 0.3) if not running else free_at_s
                running += started
        assert num_shed > 500
        assert len(ttft_s) > 40
        assert max(ttft_s) <= 1.0

    def test_best_effort_is_served_after_those_that_can_keep_theirs(self) -> None:
        story = Story(Overload.BEST_EFFORT)
        for name in "abcd":
            actions = story.arrive(name)
        assert [one.request_id for one in actions if isinstance(one, Degrade)] == ["d"]
        story.now += 0.3
        story.first_token("a")
        story.arrive("e", num_tokens=10)
        order = []
        for _ in range(4):
            story.now += 0.3
            running = next(one for one in "bcde" if one in story.dispatcher._sequences and _is_held(story, one))
            order += story.started(story.first_token(running))
        assert order.index("e") < order.index("d")

    def test_each_class_says_what_becomes_of_its_own(self) -> None:
        classes = {
            "interactive": ServiceClass(overload=Overload.SHED),
            "batch": ServiceClass(overload=Overload.QUEUE),
            "free": ServiceClass(overload=Overload.BEST_EFFORT),
            "plain": ServiceClass(),
        }
        for overload, of_all in ((Overload.QUEUE, None), (Overload.SHED, Refuse)):
            story = Story(overload, classes=classes)
            for name in "abc":
                story.arrive(name)

            def verdict(name: str, story: Story = story) -> type | None:
                actions = story.arrive(name, service_class=name)
                return next((type(one) for one in actions if isinstance(one, Refuse | Degrade)), None)

            assert verdict("interactive") is Refuse
            assert verdict("plain") is of_all
            assert verdict("free") is Degrade
            assert verdict("batch") is None

    def test_a_class_that_is_shed_is_named(self) -> None:
        story = Story(Overload.QUEUE, classes={"interactive": ServiceClass(overload=Overload.SHED)})
        assert not any(isinstance(one, Refuse) for name in "abcd" for one in story.arrive(name))
        (refusal,) = story.arrive("e", service_class="interactive")
        assert refusal.reason is RefuseReason.SHED
        assert "overload of the class interactive: shed" in refusal.detail

    def test_a_more_important_class_does_not_wait_for_the_others(self) -> None:
        story = Story(Overload.QUEUE, classes={"interactive": ServiceClass(overload=Overload.SHED)})
        for number in range(20):
            story.arrive(f"batch{number}", priority=10)
        actions = story.arrive("chat", service_class="interactive", priority=-10, num_tokens=10)
        assert not any(isinstance(one, Refuse) for one in actions), "what waits is served after it"
        running = [one for one in story.dispatcher._sequences if _is_held(story, one)]
        story.now += 0.3
        assert story.started(story.first_token(running[0]))[0] == "chat"

    @pytest.mark.parametrize(("priority", "is_shed"), [(-10, False), (10, True)])
    def test_a_more_important_class_is_not_shed_for_what_instances_have_at_hand(
        self, priority: int, is_shed: bool
    ) -> None:
        story = Story(Overload.SHED)
        story.arrive("long", num_tokens=890)
        actions = story.arrive("chat", num_tokens=100, priority=priority)
        assert any(isinstance(one, Refuse) for one in actions) is is_shed

    def test_best_effort_is_served_in_the_end(self) -> None:
        story = Story(Overload.BEST_EFFORT)
        for name in "abcd":
            story.arrive(name)
        late = story.dispatcher._sequences[RequestId("d")]
        story.now += MAX_OVERTAKE_S + 1.1
        story.arrive("new", num_tokens=10)
        fresh = story.dispatcher._sequences.get(RequestId("new"))
        assert fresh is None or late.rank < fresh.rank

    def test_who_presses_waits_while_there_would_be_no_room_for_a_prompt_like_that_of_others(self) -> None:
        story = Story(Overload.SHED)
        story.arrive("long", num_tokens=600, tenant="quiet")
        story.now += 0.6
        story.first_token("long")
        started = [story.started(story.arrive(f"flood{number}", 100, tenant="flood")) for number in range(3)]
        assert started == [["flood0"], ["flood1"], []]
        assert story.started(story.arrive("short", 100, tenant="quiet")) == ["short"], "the room was kept for it"
        story.now += 60.0
        assert "flood2" in story.started(story.first_token("flood0")), "nobody is expected any more"

    def test_what_preparing_took_counts(self) -> None:
        assert not any(isinstance(one, Refuse) for one in Story(Overload.SHED).arrive("a"))
        (refusal,) = Story(Overload.SHED).arrive("a", prepared_s=0.75)
        assert isinstance(refusal, Refuse)

    def test_a_tenant_has_no_more_under_way_than_it_may(self) -> None:
        story = Story(Overload.QUEUE, {"small": TenantSettings(max_requests=2)})
        story.arrive("a", tenant="small")
        story.arrive("b", tenant="small")
        (refusal,) = story.arrive("c", tenant="small")
        assert isinstance(refusal, Refuse)
        assert "max_requests" in refusal.detail
        story.send(SequenceCancelled(request_id=RequestId("b"), epoch=Epoch(1)))
        assert not any(isinstance(one, Refuse) for one in story.arrive("c", tenant="small"))


def _is_held(story: Story, name: str) -> bool:
    return story.dispatcher._sequences[RequestId(name)].holder is not None
