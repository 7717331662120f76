"""The router's core: what instances say and do, told as short stories of inputs and outputs."""

import pytest
from instance_facts import FACTS
from msgspec import structs

from disagg.base.config import RouterSettings
from disagg.base.errors import ConfigurationError
from disagg.base.ids import BlockId, Epoch, InstanceId, RequestId
from disagg.base.message_fields import PROTOCOL_VERSION
from disagg.base.messages import InstanceLoad, KvOffer, Loading, LoadReport, Offered, Pulled, Ready
from disagg.base.request import Role
from disagg.scheduling.dispatch.actions import (
    Drained,
    Fail,
    FailReason,
    Finish,
    Resume,
    SendGenerate,
    SendMigrate,
    SendRelease,
)
from disagg.scheduling.dispatch.events import (
    ChangeRole,
    Drain,
    Join,
    Leave,
    ProcessStarting,
    Progress,
    SequenceArrived,
    TokensEmitted,
    Undrain,
)
from disagg.scheduling.dispatch.state import InstanceState
from disagg.scheduling.router.core import RouterCore
from disagg.scheduling.router.header import RouterHeader
from disagg.scheduling.router.inputs import AnyRouterInput, InstanceSaid, MalformedMessage, ProcessExited, Unreachable
from disagg.scheduling.router.outputs import (
    AnyRouterOutput,
    DropReason,
    EndInstance,
    GiveUpInstance,
    HandOverEnded,
    InstanceLeft,
    InstanceLost,
    InstanceWelcomed,
    MessageDropped,
    RestartInstance,
    SendOffer,
    StopInstance,
    TellPeerLost,
)
from disagg.scheduling.router.restart import RestartSettings
from disagg.scheduling.step.actions import WakeAt
from disagg.scheduling.step.events import Tick

P0, P1 = (InstanceId(name) for name in ("prefill-0", "prefill-1"))
D0, D1 = (InstanceId(name) for name in ("decode-0", "decode-1"))
C0, C1 = (InstanceId(name) for name in ("colocated-0", "colocated-1"))
PAIR = {P0: Role.PREFILL, D0: Role.DECODE}
A = RequestId("a")
IDS = {"request_id": A, "epoch": Epoch(0)}


class Story:
    """A core whose time passes only when told. Its books are checked after every input."""

    def __init__(self, instances: dict[InstanceId, Role], **settings: float) -> None:
        header = RouterHeader(
            instances=instances,
            settings=RouterSettings(**{"instance_timeout_s": 4.0, **settings}),  # type: ignore[arg-type]
            started_s=100.0,
            restarts=RestartSettings(max_quick_deaths=2),
        )
        self.core = RouterCore(header)
        self.now = 100.0

    def tell(self, one: AnyRouterInput) -> list[AnyRouterOutput]:
        outputs = self.core.handle(one, self.now)
        self.core.validate()
        return [output for output in outputs if not isinstance(output, WakeAt)]

    def say(self, instance: InstanceId, message: Loading | Ready | Offered | Pulled | LoadReport):
        return self.tell(InstanceSaid(instance=instance, message=message))

    def ready(
        self,
        instance: InstanceId,
        role: Role,
        incarnation: str = "1",
        kv_layout: str = "",
        block_size: int = 16,
        **changes: object,
    ):
        facts = structs.replace(FACTS, kv_layout=kv_layout, block_size=block_size)
        fields = {"version": PROTOCOL_VERSION, "instance": instance, "role": role, **changes}
        return self.say(instance, Ready(incarnation=incarnation, facts=facts, **fields))  # type: ignore[arg-type]

    def arrive(self, name: RequestId = A, num_tokens: int = 5):
        return self.tell(SequenceArrived(request_id=name, epoch=Epoch(0), num_tokens=num_tokens, max_total_tokens=20))

    def emit(self, instance: InstanceId, count: int = 1, finished: bool = False):
        progress = (Progress(A, Epoch(0), count, finished),)
        return self.tell(TokensEmitted(instance=instance, progress=progress))

    def state(self, instance: InstanceId) -> InstanceState:
        return self.core.members[instance].state


@pytest.fixture
def pair() -> Story:
    story = Story(PAIR)
    story.ready(P0, Role.PREFILL)
    story.ready(D0, Role.DECODE)
    return story


def offer(lease_s: float = 60.0, incarnation: str = "1") -> KvOffer:
    return KvOffer(
        **IDS,
        source=P0,
        incarnation=incarnation,
        num_tokens=5,
        block_size=4,
        block_ids=(BlockId(0),),
        lease_s=lease_s,
        pool=b"p",
    )


def decoding_on_the_first_of_two() -> Story:
    """Return a story in which a sequence was handed over from P0 to D0, and D1 is there, too."""
    story = Story({P0: Role.PREFILL, D0: Role.DECODE, D1: Role.DECODE})
    for name in (P0, D0, D1):
        story.ready(name, Role.PREFILL if name == P0 else Role.DECODE)
    story.arrive()
    story.emit(P0)
    story.say(P0, Offered(offer=offer()))
    story.say(D0, Pulled(**IDS, source=P0, num_bytes=7, duration_s=0.5))
    return story


def test_a_hand_over_from_arrival_to_end(pair: Story) -> None:
    assert pair.arrive() == [SendGenerate(**IDS, instance=P0, hand_over=True)]
    pair.emit(P0)
    assert pair.say(P0, Offered(offer=offer())) == [SendOffer(**IDS, instance=D0, offer=offer())]
    pulled = Pulled(**IDS, source=P0, num_bytes=7, duration_s=0.5)
    assert pair.say(D0, pulled) == [
        HandOverEnded(source=P0, target=D0, num_bytes=7, duration_s=0.5, failure=""),
        SendRelease(**IDS, instance=P0),
    ]
    assert pair.emit(D0, finished=True)[-1] == Finish(**IDS)
    assert pair.core.num_sequences == 0


def test_a_lease_that_waited_here_is_passed_on_shorter() -> None:
    story = Story(PAIR)
    story.ready(P0, Role.PREFILL)
    story.arrive()  # a decode instance is still to come
    story.emit(P0)
    assert story.say(P0, Offered(offer=offer())) == []
    story.now += 15.0
    passed_on = structs.replace(offer(lease_s=45.0), answer_age_s=15.0)
    assert story.ready(D0, Role.DECODE)[0] == SendOffer(**IDS, instance=D0, offer=passed_on)


def test_the_limit_of_an_instance_is_the_smaller_of_its_pool_and_its_model(pair: Story) -> None:
    (failed,) = pair.tell(SequenceArrived(**IDS, num_tokens=5, max_total_tokens=101))
    assert isinstance(failed, Fail)
    assert failed.reason is FailReason.TOO_LONG
    assert "holds 100 tokens" in failed.detail


class TestSilence:
    def test_a_silent_instance_is_lost_and_ended(self, pair: Story) -> None:
        for _ in range(4):
            pair.now += 1.0
            pair.say(P0, LoadReport(instance=P0, incarnation="1", load=InstanceLoad()))
            assert pair.tell(Tick()) == []
        pair.now += 1.0
        pair.say(P0, LoadReport(instance=P0, incarnation="1", load=InstanceLoad()))
        lost, told, end = pair.tell(Tick())
        assert (lost, told) == (InstanceLost(instance=D0), TellPeerLost(instance=P0, lost=D0, incarnation="1"))
        assert end == EndInstance(instance=D0, why="no sign of life for 4 s")
        assert pair.state(D0) is InstanceState.LOST

    def test_nobody_is_silent_while_the_router_itself_stood_still(self, pair: Story) -> None:
        pair.now += 60.0  # no tick in between: this process was stopped
        assert pair.tell(Tick()) == []

    def test_a_tick_is_asked_for_as_long_as_there_are_instances(self) -> None:
        core = RouterCore(RouterHeader(instances=PAIR, settings=RouterSettings(instance_timeout_s=4.0)))
        assert core.handle(Tick(), 1.0) == [WakeAt(time_s=2.0)]
        assert core.handle(Tick(), 1.5) == [WakeAt(time_s=2.0)]
        assert core.handle(Tick(), 2.0) == [WakeAt(time_s=3.0)]


class TestLives:
    def test_the_first_death_restarts_at_once_and_the_next_gives_up(self, pair: Story) -> None:
        pair.arrive()
        outputs = pair.tell(ProcessExited(instance=P0, detail="killed"))
        assert outputs[0] == InstanceLost(instance=P0)
        assert outputs[-1] == RestartInstance(instance=P0, delay_s=0.0)
        assert [output.epoch for output in outputs if isinstance(output, Resume)] == [1]
        pair.tell(ProcessStarting(instance=P0))
        assert pair.state(P0) is InstanceState.STARTING
        pair.ready(P0, Role.PREFILL, incarnation="2")
        assert pair.tell(ProcessExited(instance=P0, detail="killed"))[-1] == GiveUpInstance(
            instance=P0, nothing_left=True
        )
        assert (pair.state(P0), pair.core.members[P0].num_restarts) == (InstanceState.GONE, 2)

    def test_one_that_never_was_ready_is_not_tried_again(self) -> None:
        story = Story({C0: Role.COLOCATED, C1: Role.COLOCATED})
        assert story.tell(ProcessExited(instance=C0, detail="exit 2")) == [GiveUpInstance(instance=C0)]

    def test_three_malformed_messages_end_an_instance(self, pair: Story) -> None:
        dropped = MessageDropped(instance=D0, reason=DropReason.MALFORMED)
        for _ in range(2):
            assert pair.tell(MalformedMessage(instance=D0, error="not msgpack")) == [dropped]
        assert pair.tell(MalformedMessage(instance=D0, error="not msgpack"))[-1] == EndInstance(
            instance=D0, why="3 malformed messages, the last: not msgpack"
        )

    def test_what_cannot_be_true_ends_the_instance_that_said_it(self, pair: Story) -> None:
        pair.arrive()
        pair.emit(P0)
        outputs = pair.say(P0, Offered(offer=offer(incarnation="another")))
        assert isinstance(outputs[-1], EndInstance)
        assert outputs[-1].why == "it broke the protocol: it offered blocks of prefill-0 another"

    def test_two_outputs_of_one_step_for_one_sequence_break_the_protocol(self, pair: Story) -> None:
        pair.arrive()
        progress = (Progress(A, Epoch(0), 1, False), Progress(A, Epoch(0), 1, False))
        outputs = pair.tell(TokensEmitted(instance=P0, progress=progress))
        assert isinstance(outputs[-1], EndInstance)

    def test_an_unreachable_instance_is_lost(self, pair: Story) -> None:
        assert pair.tell(Unreachable(instance=P0, why="not connected"))[-1] == EndInstance(
            instance=P0, why="not connected"
        )

    @pytest.mark.parametrize(
        ("changes", "words"), [({"version": 1}, "speaks protocol version 1"), ({"role": Role.DECODE}, "for decode")]
    )
    def test_an_unfit_instance_is_ended(self, changes: dict[str, object], words: str) -> None:
        story = Story(PAIR)
        (end,) = story.ready(P0, **{"role": Role.PREFILL, **changes})  # type: ignore[arg-type]
        assert isinstance(end, EndInstance)
        assert words in end.why

    def test_a_second_life_announced_by_itself_ends_the_first(self, pair: Story) -> None:
        assert pair.ready(P0, Role.PREFILL) == []  # said twice
        pair.arrive()
        outputs = pair.ready(P0, Role.PREFILL, incarnation="2")
        assert [type(output) for output in outputs] == [
            InstanceLost,
            TellPeerLost,
            Resume,
            SendGenerate,
            InstanceWelcomed,
        ]


class TestMembership:
    def test_an_instance_that_joins_is_used_once_it_is_ready(self) -> None:
        story = Story({C0: Role.COLOCATED})
        story.ready(C0, Role.COLOCATED)
        story.arrive()
        assert story.tell(Join(instance=C1, role=Role.COLOCATED)) == []
        assert story.arrive(RequestId("b")) == [
            SendGenerate(request_id=RequestId("b"), epoch=Epoch(0), instance=C0, hand_over=False)
        ]
        assert story.ready(C1, Role.COLOCATED) == [InstanceWelcomed(instance=C1)]
        assert story.arrive(RequestId("c"))[0].instance == C1  # type: ignore[union-attr]

    def test_a_draining_instance_finishes_what_it_holds_and_gets_nothing_new(self) -> None:
        story = Story({C0: Role.COLOCATED, C1: Role.COLOCATED})
        story.ready(C0, Role.COLOCATED)
        story.ready(C1, Role.COLOCATED)
        story.arrive()
        assert story.tell(Drain(instance=C0)) == [SendMigrate(**IDS, instance=C0)]
        for name in ("b", "c"):
            assert story.arrive(RequestId(name))[0].instance == C1  # type: ignore[union-attr]
        assert story.emit(C0, finished=True)[1:] == [Drained(instance=C0), Finish(**IDS)]
        assert story.tell(Leave(instance=C0))[0] == InstanceLost(instance=C0)
        assert [member.instance for member in story.core.members] == [C1]

    def test_one_that_was_to_leave_and_holds_nothing_is_no_loss(self, pair: Story) -> None:
        assert pair.tell(Drain(instance=D0, leave=True, force=True)) == [
            Drained(instance=D0),
            StopInstance(instance=D0),
        ]
        outputs = pair.tell(Leave(instance=D0))
        assert outputs[-1] == InstanceLeft(instance=D0)
        assert InstanceLost(instance=D0) not in outputs

    def test_an_idle_instance_has_drained_at_once(self, pair: Story) -> None:
        assert pair.tell(Drain(instance=D0, force=True)) == [Drained(instance=D0)]
        assert pair.state(D0) is InstanceState.DRAINING
        assert not pair.core.can_serve()

    def test_where_roles_are_leanings_any_instance_that_is_left_serves(self) -> None:
        story = Story(PAIR, strict_roles=False)
        for name, role in PAIR.items():
            story.ready(name, role)
        assert story.tell(Drain(instance=P0)) == [Drained(instance=P0)]
        assert story.core.can_serve()

    def test_blocks_kept_for_another_instance_are_something_held(self, pair: Story) -> None:
        pair.arrive()
        pair.emit(P0)
        pair.say(P0, Offered(offer=offer()))
        assert pair.tell(Drain(instance=P0, force=True)) == []
        pulled = Pulled(**IDS, source=P0, num_bytes=7, duration_s=0.5)
        assert pair.say(D0, pulled)[-2:] == [SendRelease(**IDS, instance=P0), Drained(instance=P0)]

    def test_an_instance_that_leaves_loses_what_it_held(self) -> None:
        story = Story({C0: Role.COLOCATED, C1: Role.COLOCATED})
        story.ready(C0, Role.COLOCATED)
        story.ready(C1, Role.COLOCATED)
        story.arrive()
        outputs = story.tell(Leave(instance=C0))
        assert [output.epoch for output in outputs if isinstance(output, Resume)] == [1]
        assert TellPeerLost(instance=C1, lost=C0, incarnation="1") in outputs

    def test_what_an_instance_says_after_it_has_left_is_nothing(self, pair: Story) -> None:
        pair.tell(Leave(instance=D0))
        assert pair.say(D0, LoadReport(instance=D0, incarnation="1", load=InstanceLoad())) == []
        assert pair.tell(Unreachable(instance=D0, why="it is not connected")) == []
        assert pair.emit(D0) == []

    def test_an_instance_whose_blocks_the_others_cannot_read_is_refused_in_words(self) -> None:
        story = Story(PAIR)
        story.ready(P0, Role.PREFILL, kv_layout="64 tokens, bfloat16")
        (ended,) = story.ready(D0, Role.DECODE, kv_layout="32 tokens, bfloat16")
        assert isinstance(ended, EndInstance)
        assert "(32 tokens, bfloat16) are not those of prefill-0 (64 tokens, bfloat16)" in ended.why

    def test_an_instance_whose_blocks_are_no_multiple_of_the_others_is_refused_in_words(self) -> None:
        story = Story(PAIR)
        story.ready(P0, Role.PREFILL, kv_layout="same", block_size=16)
        (ended,) = story.ready(D0, Role.DECODE, kv_layout="same", block_size=24)
        assert isinstance(ended, EndInstance)
        assert "cannot be made of those of prefill-0, blocks of 16 and of 24 tokens: the larger must be" in ended.why

    def test_an_instance_with_larger_blocks_joins(self) -> None:
        story = Story(PAIR)
        story.ready(P0, Role.PREFILL, kv_layout="same", block_size=16)
        story.ready(D0, Role.DECODE, kv_layout="same", block_size=32)
        assert story.state(D0) is InstanceState.READY

    def test_a_role_changes_for_what_comes_and_what_is_held_goes_on_as_it_began(self) -> None:
        story = Story({C0: Role.COLOCATED, C1: Role.COLOCATED})
        story.ready(C0, Role.COLOCATED)
        story.ready(C1, Role.COLOCATED)
        story.arrive()
        assert story.tell(ChangeRole(instance=C0, role=Role.PREFILL)) == [SendMigrate(**IDS, instance=C0)]
        story.tell(ChangeRole(instance=C1, role=Role.DECODE))
        assert story.core.can_serve()
        (sent,) = story.arrive(RequestId("b"))
        assert sent == SendGenerate(request_id=RequestId("b"), epoch=Epoch(0), instance=C0, hand_over=True)
        assert story.emit(C0, finished=True)[-1] == Finish(**IDS)

    def test_a_running_answer_moves_with_its_blocks_and_then_the_instance_has_drained(self) -> None:
        story = decoding_on_the_first_of_two()
        story.emit(D0, count=3)
        assert story.tell(Drain(instance=D0)) == [SendMigrate(**IDS, instance=D0)]
        story.emit(D0)  # it goes on until its blocks are offered
        second = structs.replace(offer(), source=D0, num_tokens=9)
        passed_on = structs.replace(second, num_later_tokens=4)
        assert story.say(D0, Offered(offer=second)) == [SendOffer(**IDS, instance=D1, offer=passed_on)]
        pulled = Pulled(**IDS, source=D0, num_bytes=7, duration_s=0.5)
        assert story.say(D1, pulled)[1:] == [SendRelease(**IDS, instance=D0), Drained(instance=D0)]
        assert story.emit(D1, finished=True)[-1] == Finish(**IDS)

    def test_an_answer_that_nobody_else_can_take_ends_where_it_is(self) -> None:
        story = Story({C0: Role.COLOCATED, C1: Role.COLOCATED})
        story.ready(C0, Role.COLOCATED)
        story.arrive()
        assert story.tell(Drain(instance=C0, force=True)) == []
        assert story.ready(C1, Role.COLOCATED) == [SendMigrate(**IDS, instance=C0), InstanceWelcomed(instance=C1)]

    def test_an_instance_that_was_drained_still_is_after_its_death_until_that_is_undone(self) -> None:
        story = Story({C0: Role.COLOCATED, C1: Role.COLOCATED})
        story.ready(C0, Role.COLOCATED)
        story.ready(C1, Role.COLOCATED)
        story.tell(Drain(instance=C0))
        story.tell(ProcessExited(instance=C0, detail="killed"))
        story.ready(C0, Role.COLOCATED, incarnation="2")
        assert story.state(C0) is InstanceState.DRAINING
        assert story.tell(Undrain(instance=C0)) == []
        assert story.state(C0) is InstanceState.READY

    def test_one_that_is_removed_is_stopped_once_it_holds_nothing_and_is_not_started_again(self) -> None:
        story = Story({C0: Role.COLOCATED, C1: Role.COLOCATED})
        story.ready(C0, Role.COLOCATED)
        story.ready(C1, Role.COLOCATED)
        story.arrive()
        assert story.tell(Drain(instance=C0, leave=True)) == [SendMigrate(**IDS, instance=C0)]
        stopped = [Drained(instance=C0), StopInstance(instance=C0), Finish(**IDS)]
        assert story.emit(C0, finished=True)[1:] == stopped
        assert story.tell(ProcessExited(instance=C0, detail="exit status 0"))[-1] == InstanceLeft(instance=C0)
        assert [member.instance for member in story.core.members] == [C1]

    def test_one_that_dies_while_it_leaves_has_left_and_its_answers_go_on(self) -> None:
        story = Story({C0: Role.COLOCATED, C1: Role.COLOCATED})
        story.ready(C0, Role.COLOCATED)
        story.ready(C1, Role.COLOCATED)
        story.arrive()
        story.tell(Drain(instance=C0, leave=True))
        outputs = story.tell(ProcessExited(instance=C0, detail="killed"))
        assert [type(output) for output in outputs] == [TellPeerLost, Resume, SendGenerate, InstanceLeft]

    def test_one_that_was_given_up_is_struck_off_at_once(self) -> None:
        story = Story({C0: Role.COLOCATED, C1: Role.COLOCATED})
        story.ready(C1, Role.COLOCATED)
        story.tell(ProcessExited(instance=C0, detail="exit 2"))
        assert story.tell(Drain(instance=C0, leave=True)) == [StopInstance(instance=C0), InstanceLeft(instance=C0)]

    def test_a_decode_instance_that_becomes_a_prefill_instance_gives_its_answers_away(self) -> None:
        story = decoding_on_the_first_of_two()
        assert story.tell(ChangeRole(instance=D0, role=Role.PREFILL)) == [SendMigrate(**IDS, instance=D0)]

    def test_a_prefill_instance_that_becomes_the_decode_instance_computes_its_own_offers_again(self) -> None:
        story = Story({P0: Role.PREFILL, P1: Role.PREFILL, D0: Role.DECODE})
        for name in (P0, P1):
            story.ready(name, Role.PREFILL)
        story.arrive()
        story.emit(P0)
        story.say(P0, Offered(offer=offer()))
        again = {"request_id": A, "epoch": Epoch(1)}
        outputs = story.tell(ChangeRole(instance=P0, role=Role.DECODE))
        assert outputs[0] == SendRelease(**IDS, instance=P0)
        assert isinstance(outputs[1], Resume)
        assert outputs[2] == SendGenerate(**again, instance=P1, hand_over=True)

    @pytest.mark.parametrize(
        ("command", "words"),
        [
            (Join(instance=P0, role=Role.DECODE), "there is an instance prefill-0 already"),
            (Drain(instance=InstanceId("prefill-9")), "no instance prefill-9, only prefill-0, decode-0"),
            (Drain(instance=D0), "decode-0 cannot drain: it is starting"),
            (Drain(instance=P0), "without prefill-0, no request could be served: add another prefill instance first"),
            (Drain(instance=P0, leave=True), "without prefill-0, no request"),
            (Undrain(instance=P0), "prefill-0 cannot be given sequences again: it is not draining"),
            (ChangeRole(instance=P0, role=Role.PREFILL), "prefill-0 is a prefill instance already"),
            (ChangeRole(instance=P0, role=Role.DECODE), "as a decode instance prefill-0, no request could be served"),
        ],
    )
    def test_a_command_that_cannot_be_carried_out_says_why(self, command: AnyRouterInput, words: str) -> None:
        story = Story(PAIR)
        story.ready(P0, Role.PREFILL)
        with pytest.raises(ConfigurationError, match=words):
            story.tell(command)


def test_what_a_lost_instance_still_says_is_stale(pair: Story) -> None:
    pair.tell(ProcessExited(instance=D0, detail="killed"))
    pulled = Pulled(**IDS, source=P0, num_bytes=7, duration_s=0.5)
    assert pair.say(D0, pulled) == [MessageDropped(instance=D0, reason=DropReason.STALE)]
    assert pair.say(D0, Loading(instance=D0, stage="weights", fraction=0.5)) == []


def test_an_offer_of_an_earlier_attempt_is_not_the_offer_of_the_next() -> None:
    story = Story({P0: Role.PREFILL, P1: Role.PREFILL, D0: Role.DECODE})
    for name in (P0, P1):
        story.ready(name, Role.PREFILL)
    story.arrive()
    story.emit(P0)
    story.say(P0, Offered(offer=offer()))
    again = {"request_id": A, "epoch": Epoch(1)}
    outputs = story.tell(ProcessExited(instance=P0, detail="killed"))
    assert SendGenerate(**again, instance=P1, hand_over=True) in outputs
    story.tell(TokensEmitted(instance=P1, progress=(Progress(A, Epoch(1), 1, False),)))
    second = structs.replace(offer(), epoch=Epoch(1), source=P1, num_tokens=6)
    story.say(P1, Offered(offer=second))
    passed_on = structs.replace(second, num_later_tokens=1)  # the first of its tokens was the first attempt's
    assert story.ready(D0, Role.DECODE)[0] == SendOffer(**again, instance=D0, offer=passed_on)
    assert story.say(D0, Pulled(**IDS, source=P0, num_bytes=7, duration_s=0.5))[-1] == MessageDropped(
        instance=D0, reason=DropReason.STALE
    )


def test_a_zombie_that_is_back_is_not_listened_to_about_what_went_on_elsewhere() -> None:
    story = Story({C0: Role.COLOCATED, C1: Role.COLOCATED})
    story.ready(C0, Role.COLOCATED)
    story.ready(C1, Role.COLOCATED)
    story.arrive()
    assert story.tell(Unreachable(instance=C0, why="frozen"))[-1] == EndInstance(instance=C0, why="frozen")
    dropped = [MessageDropped(instance=C0, reason=DropReason.STALE)]
    assert story.emit(C0) == dropped
    story.ready(C0, Role.COLOCATED)
    assert story.emit(C0, finished=True) == dropped
    progress = (Progress(A, Epoch(1), 1, True),)
    assert story.tell(TokensEmitted(instance=C1, progress=progress))[-1] == Finish(request_id=A, epoch=Epoch(1))
