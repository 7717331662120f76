"""An instance with sequences of several routers: what is whose, and what becomes of it when a router is gone."""

from hypothesis import given, settings
from hypothesis import strategies as st
from instance_facts import FACTS

from disagg.base.config import RouterSettings, SchedulerSettings
from disagg.base.ids import BlockHash, Epoch, InstanceId, RequestId, RouterId, owned_by, owner_of
from disagg.base.message_fields import PROTOCOL_VERSION
from disagg.base.messages import KvOffer, Lend, LoadReport, Offered, Ready
from disagg.base.request import Role
from disagg.base.router_messages import ForeignLoad, LeaveRouter
from disagg.scheduling.dispatch.actions import SendGenerate
from disagg.scheduling.dispatch.events import SequenceArrived
from disagg.scheduling.dispatch.state import InstanceState
from disagg.scheduling.instance.core import InstanceCore
from disagg.scheduling.instance.header import InstanceHeader
from disagg.scheduling.instance.inputs import AnyInstanceInput, Continue, CopyEnded, SequenceFacts, Start
from disagg.scheduling.instance.outputs import StartCopy
from disagg.scheduling.router.core import RouterCore
from disagg.scheduling.router.header import RouterHeader
from disagg.scheduling.router.inputs import InstanceSaid, ProcessExited
from disagg.scheduling.router.outputs import RestartInstance
from disagg.scheduling.step.actions import RunStep
from disagg.scheduling.step.events import StepDone, StepResult

OURS, THEIRS = RouterId("0.1"), RouterId("1.1")
NAME = InstanceId("colocated-0")
P0, P1, D0 = InstanceId("prefill-0"), InstanceId("prefill-1"), InstanceId("decode-0")
BLOCK = 4


class Instance:
    """A core whose steps and copies end when they are told to."""

    def __init__(self) -> None:
        header = InstanceHeader(
            instance=NAME, settings=SchedulerSettings(max_batch_size=3), num_blocks=12, block_size=BLOCK
        )
        self.core = InstanceCore(header)
        self.now = 0.0
        self.steps: list[RunStep] = []
        self.copies: list[StartCopy] = []
        self.offers: list[RequestId] = []
        self.num_started = 0

    def handle(self, *inputs: AnyInstanceInput) -> None:
        self.now += 0.01
        for output in self.core.handle(inputs, self.now):
            if isinstance(output, RunStep):
                self.steps.append(output)
            elif isinstance(output, StartCopy):
                self.copies.append(output)
            elif isinstance(output, Offered):
                self.offers.append(output.offer.request_id)
        self.core.validate()

    def facts(self, router: RouterId, num_tokens: int) -> SequenceFacts:
        self.num_started += 1
        names = tuple(BlockHash(bytes([number])) for number in range(num_tokens // BLOCK))
        name = owned_by(router, f"cmpl-{self.num_started}")
        return SequenceFacts(
            request_id=name,
            epoch=Epoch(0),
            num_tokens=num_tokens,
            max_total_tokens=num_tokens + 6,
            block_hashes=names,
        )

    def start(self, router: RouterId, num_tokens: int, *, hand_over: bool) -> None:
        self.handle(Start(sequence=self.facts(router, num_tokens), hand_over=hand_over))

    def adopt(self, router: RouterId, num_tokens: int) -> None:
        facts = self.facts(router, num_tokens)
        offer = KvOffer(
            request_id=facts.request_id,
            epoch=facts.epoch,
            source=P0,
            incarnation="1",
            num_tokens=num_tokens - 1,
            block_size=BLOCK,
            block_ids=tuple(range(-(-(num_tokens - 1) // BLOCK))),
            lease_s=60.0,
            pool=b"",
        )
        self.handle(Continue(sequence=facts, offer=offer))

    def lend(self, router: RouterId) -> None:
        self.num_started += 1
        name = owned_by(router, f"cmpl-{self.num_started}")
        self.handle(Lend(request_id=name, epoch=Epoch(0), block_hashes=(BlockHash(b"\0"),)))

    def end_step(self) -> None:
        if self.steps:
            step = self.steps.pop(0)
            results = tuple(StepResult(chunk.request_id) for chunk in step.chunks if chunk.samples)
            self.handle(StepDone(step_id=step.step_id, results=results))

    def end_copy(self) -> None:
        if self.copies:
            copy = self.copies.pop(0)
            ended = CopyEnded(
                request_id=copy.request_id, epoch=copy.epoch, num_bytes=1, started_s=self.now, ended_s=self.now
            )
            self.handle(ended)


def held_by(instance: Instance, router: RouterId) -> int:
    """How many sequences, leases and loans there are of a router."""
    nobody = RouterId("nobody")
    return instance.core.load_of_others(nobody).num_sequences - instance.core.load_of_others(router).num_sequences


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["start", "hand over", "adopt", "lend", "step", "copy", "leave"]),
            st.sampled_from([OURS, THEIRS]),
            st.integers(2, 14),
        ),
        max_size=40,
    )
)
@settings(max_examples=150, deadline=None)
def test_a_router_that_is_gone_leaves_nothing_and_takes_nothing_of_others(
    steps: list[tuple[str, RouterId, int]],
) -> None:
    instance = Instance()
    for what, router, number in steps:
        match what:
            case "start":
                instance.start(router, number, hand_over=False)
            case "hand over":
                instance.start(router, number, hand_over=True)
            case "adopt":
                instance.adopt(router, number)
            case "lend":
                instance.lend(router)
            case "step":
                instance.end_step()
            case "copy":
                instance.end_copy()
            case "leave":
                other = THEIRS if router == OURS else OURS
                before = held_by(instance, other)
                instance.handle(LeaveRouter(router=router))
                assert held_by(instance, router) == 0
                assert held_by(instance, other) == before
    instance.handle(LeaveRouter(router=OURS), LeaveRouter(router=THEIRS))
    while instance.steps or instance.copies:
        instance.end_step()
        instance.end_copy()
    audit = instance.core.audit()
    assert audit.free + audit.cached == audit.total


def test_each_router_is_told_the_load_of_the_others() -> None:
    instance = Instance()
    instance.start(OURS, 8, hand_over=False)
    instance.start(THEIRS, 5, hand_over=True)
    assert instance.core.load_of_others(THEIRS) == ForeignLoad(
        num_sequences=1, num_prefills=1, prefill_tokens=8, prefill_squares=64
    )
    assert instance.core.load_of_others(OURS) == ForeignLoad(
        num_sequences=1, num_prefills=1, prefill_tokens=5, prefill_squares=25
    )
    while not instance.offers:
        instance.end_step()
    assert [owner_of(name) for name in instance.offers] == [THEIRS]
    assert instance.core.load_of_others(OURS) == ForeignLoad(num_sequences=1, kv_tokens=6), "it is leased"
    assert instance.core.load_of_others(THEIRS).num_decodes == 1


def ready(instance: InstanceId, incarnation: str, role: Role) -> Ready:
    return Ready(version=PROTOCOL_VERSION, instance=instance, incarnation=incarnation, role=role, facts=FACTS)


class Router:
    """A router's core before two prefill instances and a decode instance."""

    def __init__(self, **header: object) -> None:
        instances = {P0: Role.PREFILL, P1: Role.PREFILL, D0: Role.DECODE}
        self.core = RouterCore(RouterHeader(instances=instances, settings=RouterSettings(), **header))
        for instance, role in instances.items():
            self.say(
                instance, Ready(version=PROTOCOL_VERSION, instance=instance, incarnation="1", role=role, facts=FACTS)
            )

    def say(self, instance: InstanceId, message: Ready | LoadReport) -> None:
        self.core.handle(InstanceSaid(instance=instance, message=message), 1.0)

    def report(self, instance: InstanceId, foreign: ForeignLoad) -> None:
        load = self.core.members[instance].load
        self.say(instance, LoadReport(instance=instance, incarnation="1", load=load, foreign=foreign))

    def arrive(self, name: str) -> InstanceId:
        arrived = SequenceArrived(request_id=RequestId(name), epoch=Epoch(0), num_tokens=10, max_total_tokens=20)
        (given,) = (one for one in self.core.handle(arrived, 1.0) if isinstance(one, SendGenerate))
        return given.instance


def test_dispatch_keeps_away_from_what_others_have_filled() -> None:
    router = Router()
    router.report(P0, ForeignLoad(num_sequences=1, num_prefills=1, prefill_tokens=100, prefill_squares=10_000))
    assert [router.arrive("a"), router.arrive("b")] == [P1, P1]
    router.core.validate()
    router.report(P0, ForeignLoad())
    assert router.arrive("c") == P0
    router.core.validate()


def test_what_others_had_on_an_instance_goes_with_its_life() -> None:
    router = Router()
    router.report(P0, ForeignLoad(num_sequences=1, num_prefills=1, prefill_tokens=100, prefill_squares=10_000))
    router.core.handle(ProcessExited(instance=P0, detail="killed"), 2.0)
    router.say(P0, ready(P0, "2", Role.PREFILL))
    assert router.arrive("a") == P0


def test_a_router_that_follows_takes_the_keepers_word_for_a_restart() -> None:
    router = Router()
    outputs = router.core.handle(ProcessExited(instance=P0, detail="killed", returns=True), 2.0)
    assert not [one for one in outputs if isinstance(one, RestartInstance)]
    assert router.core.members[P0].state is InstanceState.LOST
    router.core.handle(ProcessExited(instance=P1, detail="killed", returns=False), 2.0)
    assert router.core.members[P1].state is InstanceState.GONE


def test_an_instance_that_was_drained_before_a_router_began_gets_nothing_from_it() -> None:
    router = Router(cordoned=(P0,))
    assert router.core.members[P0].state is InstanceState.DRAINING
    assert {router.arrive(name) for name in "abc"} == {P1}
