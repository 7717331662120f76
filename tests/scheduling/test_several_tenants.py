"""Those who share a server of several routers: bounds and shares hold over all of them."""

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st
from instance_facts import FACTS

from disagg.base.config import RouterSettings
from disagg.base.ids import Epoch, InstanceId, RequestId, RouterId
from disagg.base.message_fields import PROTOCOL_VERSION
from disagg.base.messages import Ready
from disagg.base.request import Role
from disagg.base.tenants import TenantSettings
from disagg.scheduling.dispatch.actions import Refuse
from disagg.scheduling.dispatch.events import SequenceArrived, SequenceCancelled
from disagg.scheduling.dispatch.state import SequenceEntry
from disagg.scheduling.dispatch.tenant_shares import TenantShare
from disagg.scheduling.dispatch.waiting_room import WaitingRoom
from disagg.scheduling.router.core import RouterCore
from disagg.scheduling.router.header import RouterHeader, RouterPart
from disagg.scheduling.router.inputs import AnyRouterInput, InstanceSaid, TenantsReported
from disagg.scheduling.router.outputs import AnyRouterOutput, ReportTenants
from disagg.scheduling.step.actions import WakeAt
from disagg.scheduling.step.events import Tick

C0 = InstanceId("colocated-0")
NAMES = (RouterId("0.1"), RouterId("1.1"))
TENANTS = {"a": TenantSettings(weight=3.0), "b": TenantSettings()}


def sequence(tenant: str, number: int) -> SequenceEntry:
    arrived = SequenceArrived(
        request_id=RequestId(f"{tenant}-{number}"), epoch=Epoch(0), num_tokens=10, max_total_tokens=100, tenant=tenant
    )
    return SequenceEntry.arrived(arrived, number, 0.0, 1e6)


def exchange(rooms: Sequence[WaitingRoom]) -> list[tuple[TenantShare, ...]]:
    """Let each of two rooms hear what is new in the other."""
    news = [room.news() for room in rooms]
    rooms[0].hear(NAMES[1], news[1])
    rooms[1].hear(NAMES[0], news[0])
    return news


STEPS = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.sampled_from("abc"),
        st.sampled_from(["enter", "start", "serve", "leave", "exchange"]),
        st.integers(0, 9),
    ),
    max_size=60,
)


class TwoOfOne:
    """Sequences in two routers' waiting rooms, each in its own, and all of them in one router's."""

    def __init__(self) -> None:
        self.one, self.rooms = WaitingRoom(TENANTS), (WaitingRoom(TENANTS), WaitingRoom(TENANTS))
        self.inside: tuple[list[SequenceEntry], ...] = ([], [])
        self.started: set[RequestId] = set()
        self.served, self.told = dict.fromkeys("abc", 0), dict.fromkeys("abc", 0)
        exchange(self.rooms)

    def tell(self) -> None:
        for share in (share for shares in exchange(self.rooms) for share in shares):
            self.told[share.tenant] += share.num_served

    def enter(self, whose: int, entered: SequenceEntry) -> None:
        self.inside[whose].append(entered)
        for room in (self.one, self.rooms[whose]):
            room.enter(entered)

    def serve(self, whose: int, entered: SequenceEntry, num_input: int) -> None:
        self.served[entered.tenant] += num_input + 2
        for room in (self.one, self.rooms[whose]):
            room.served(entered, num_input=num_input, num_output=1)

    def start(self, whose: int, entered: SequenceEntry) -> None:
        if entered.request_id in self.started:
            return
        self.started.add(entered.request_id)
        for room in (self.one, self.rooms[whose]):
            room.stop_waiting(entered)

    def leave(self, whose: int, entered: SequenceEntry) -> None:
        self.start(whose, entered)
        self.inside[whose].remove(entered)
        for room in (self.one, self.rooms[whose]):
            room.leave(entered)

    def go_on(self, whose: int, what: str, choice: int) -> None:
        """Let one of a router's sequences start, be served, or leave."""
        if not (own := self.inside[whose]):
            return
        entered = own[choice % len(own)]
        match what:
            case "serve":
                self.serve(whose, entered, choice)
            case "start":
                self.start(whose, entered)
            case "leave":
                self.leave(whose, entered)


@given(steps=STEPS)
@settings(max_examples=150, deadline=None)
def test_what_two_routers_tell_each_other_adds_up_to_what_one_would_have(steps: list[tuple[int, str, str, int]]):
    story = TwoOfOne()
    for number, (whose, tenant, what, choice) in enumerate(steps):
        if what == "exchange":
            story.tell()
        elif what == "enter":
            story.enter(whose, sequence(tenant, number))
        else:
            story.go_on(whose, what, choice)
    story.tell()
    assert story.told == story.served
    for whose, room in enumerate(story.rooms):
        for tenant in "abc":
            assert room.num_under_way(tenant) == story.one.num_under_way(tenant)
            assert room.num_here(tenant) == sum(one.tenant == tenant for one in story.inside[whose])
            assert room.presses(tenant, beside_guest=False) == story.one.presses(tenant, beside_guest=False)
        room.hear(NAMES[1 - whose], ())
        assert [room.num_under_way(tenant) - room.num_here(tenant) for tenant in "abc"] == [0, 0, 0]


def test_turns_are_fair_over_two_routers_of_which_one_tenant_floods_both():
    rooms = (WaitingRoom({}), WaitingRoom({}))
    exchange(rooms)
    for number in range(200):
        rooms[0].enter(sequence("flood", number))
        rooms[1].enter(sequence("flood", 200 + number))
        rooms[1].enter(sequence("other", 400 + number))
    served = dict.fromkeys(("flood", "other"), 0)
    for _ in range(100):
        for room in rooms:
            head = room.head()
            assert head is not None
            room.stop_waiting(head)
            room.served(head, num_input=head.num_tokens)
            served[head.tenant] += head.num_tokens
        exchange(rooms)
    assert abs(served["flood"] - served["other"]) <= 20, "without the other's news it is three to one"


def follower() -> RouterCore:
    """One of several routers, with an instance, and a tenant that may have two sequences."""
    made = RouterCore(
        RouterHeader(
            instances={C0: Role.COLOCATED},
            settings=RouterSettings(tenants={"a": TenantSettings(max_requests=2)}),
            watches_silence=False,
            part=RouterPart.FOLLOWER,
        )
    )
    ready = Ready(version=PROTOCOL_VERSION, instance=C0, role=Role.COLOCATED, incarnation="1", facts=FACTS)
    made.handle(InstanceSaid(instance=C0, message=ready), 0.0)
    return made


def arrival(name: str) -> SequenceArrived:
    return SequenceArrived(request_id=RequestId(name), epoch=Epoch(0), num_tokens=10, max_total_tokens=90, tenant="a")


def refused(outputs: Sequence[AnyRouterOutput]) -> bool:
    return any(isinstance(output, Refuse) for output in outputs)


def reports(core: RouterCore, one: AnyRouterInput, now: float) -> list[ReportTenants]:
    return [output for output in core.handle(one, now) if isinstance(output, ReportTenants)]


def test_a_bound_counts_what_is_under_way_at_another_router_until_that_is_gone():
    here, there = follower(), follower()
    assert WakeAt(time_s=1.05) in here.handle(arrival("here-0"), 1.0)
    there.handle(arrival("there-0"), 1.0)
    (told,) = reports(there, Tick(), 1.05)
    here.handle(TenantsReported(router=NAMES[1], shares=told.shares), 1.06)
    assert refused(here.handle(arrival("here-1"), 1.1))
    assert not refused(there.handle(arrival("there-1"), 1.1)), "it was not told"
    here.handle(TenantsReported(router=NAMES[1], shares=()), 1.2)
    assert not refused(here.handle(arrival("here-2"), 1.3))


def test_a_router_tells_of_tenants_while_it_has_work_and_its_end():
    core = follower()
    core.handle(arrival("a-0"), 1.0)
    (told,) = reports(core, Tick(), 1.05)
    assert [(share.tenant, share.num_under_way) for share in told.shares] == [("a", 1)]
    core.handle(SequenceCancelled(request_id=RequestId("a-0"), epoch=Epoch(0)), 1.06)
    (last,) = reports(core, Tick(), 1.1)
    assert not any(share.num_under_way for share in last.shares)
    assert not reports(core, Tick(), 1.2)
