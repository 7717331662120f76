"""Dispatch, told as short stories: events in, actions out."""

from collections.abc import Iterator

import pytest

from disagg.base.config import RouterSettings
from disagg.base.errors import InternalError
from disagg.base.ids import Epoch, InstanceId, RequestId
from disagg.base.messages import FailureKind
from disagg.base.request import Role
from disagg.scheduling.dispatch.actions import (
    AnyDispatchAction,
    Deliver,
    Drop,
    Fail,
    FailReason,
    Finish,
    Refuse,
    RefuseReason,
    Resume,
    SendAbort,
    SendAdopt,
    SendGenerate,
    SendPeerLost,
    SendRelease,
)
from disagg.scheduling.dispatch.dispatcher import Dispatcher
from disagg.scheduling.dispatch.events import (
    InstanceDown,
    InstanceUp,
    OfferMade,
    Progress,
    PullEnded,
    SequenceArrived,
    SequenceCancelled,
    SequenceFailed,
    TokensEmitted,
)
from disagg.scheduling.step.actions import WakeAt
from disagg.scheduling.step.events import Tick

P0, P1 = InstanceId("prefill-0"), InstanceId("prefill-1")
D0, D1 = InstanceId("decode-0"), InstanceId("decode-1")
C0 = InstanceId("colocated-0")
CAPACITY = 1000
ONE_AND_ONE = {P0: Role.PREFILL, D0: Role.DECODE}
TWO_AND_TWO = {P0: Role.PREFILL, P1: Role.PREFILL, D0: Role.DECODE, D1: Role.DECODE}


class Story:
    """A dispatcher with short words for its events. Time passes only when told; invariants are checked throughout."""

    def __init__(self, instances: dict[InstanceId, Role], *, up: bool = True, settings: RouterSettings | None = None):
        self.dispatcher = Dispatcher(instances, settings or RouterSettings())
        self.now = 100.0
        for name in instances if up else ():
            self.up(name)

    def send(self, event) -> list[AnyDispatchAction]:
        actions = self.dispatcher.handle(event, self.now)
        self.dispatcher.validate()
        return [action for action in actions if not isinstance(action, WakeAt)]

    def up(self, name: InstanceId, capacity: int = CAPACITY):
        return self.send(InstanceUp(instance=name, max_total_tokens=capacity))

    def down(self, name: InstanceId, returning: bool = True):
        return self.send(InstanceDown(instance=name, returning=returning, detail="killed by SIGKILL"))

    def arrive(self, name: str, num_tokens: int = 10, max_total_tokens: int = 100, priority: int = 0):
        return self.send(
            SequenceArrived(
                request_id=RequestId(name),
                epoch=Epoch(0),
                num_tokens=num_tokens,
                max_total_tokens=max_total_tokens,
                priority=priority,
            )
        )

    def emit(self, instance: InstanceId, name: str, num_tokens: int = 1, finished: bool = False, epoch: int = 0):
        progress = Progress(RequestId(name), Epoch(epoch), num_tokens, finished)
        return self.send(TokensEmitted(instance=instance, progress=(progress,)))

    def offer(self, instance: InstanceId, name: str, epoch: int = 0):
        return self.send(OfferMade(request_id=RequestId(name), epoch=Epoch(epoch), instance=instance))

    def pulled(self, instance: InstanceId, name: str):
        return self.send(PullEnded(request_id=RequestId(name), epoch=Epoch(0), instance=instance))

    def cancel(self, name: str, epoch: int = 0):
        return self.send(SequenceCancelled(request_id=RequestId(name), epoch=Epoch(epoch)))

    def until_offered(self, name: str, source: InstanceId = P0, **lengths: int):
        self.arrive(name, **lengths)
        self.emit(source, name)
        return self.offer(source, name)

    def loads(self) -> dict[InstanceId, tuple[int, int]]:
        return {entry.instance: (entry.prefill_tokens, entry.kv_tokens) for entry in self.dispatcher.instances}


def ids(name: str) -> dict:
    return {"request_id": RequestId(name), "epoch": Epoch(0)}


def generate(name: str, instance: InstanceId, hand_over: bool = True) -> SendGenerate:
    return SendGenerate(**ids(name), instance=instance, hand_over=hand_over)


def only(actions: list[AnyDispatchAction], kind: type) -> AnyDispatchAction:
    (found,) = [action for action in actions if isinstance(action, kind)]
    return found


@pytest.fixture
def pair() -> Iterator[Story]:
    """One prefill and one decode instance, both up."""
    story = Story(ONE_AND_ONE)
    yield story
    story.dispatcher.validate()


def test_a_sequence_is_prefilled_on_one_instance_and_decoded_on_the_other(pair):
    assert pair.arrive("a") == [generate("a", P0)]
    assert pair.loads() == {P0: (10, 0), D0: (0, 0)}
    assert pair.emit(P0, "a") == [Deliver(request_ids=(RequestId("a"),))]
    assert pair.loads() == {P0: (0, 11), D0: (0, 0)}
    assert pair.offer(P0, "a") == [SendAdopt(**ids("a"), instance=D0)]
    assert pair.loads() == {P0: (0, 11), D0: (0, 11)}
    assert pair.pulled(D0, "a") == [SendRelease(**ids("a"), instance=P0)]
    assert pair.emit(D0, "a", num_tokens=2) == [Deliver(request_ids=(RequestId("a"),))]
    assert pair.loads() == {P0: (0, 0), D0: (0, 13)}
    assert pair.emit(D0, "a", finished=True) == [Deliver(request_ids=(RequestId("a"),)), Finish(**ids("a"))]
    assert pair.loads() == {P0: (0, 0), D0: (0, 0)}
    assert pair.dispatcher.num_sequences == 0


def test_a_sequence_that_ends_at_its_first_token_never_sees_a_decode_instance(pair):
    pair.arrive("a")
    assert pair.emit(P0, "a", finished=True) == [Deliver(request_ids=(RequestId("a"),)), Finish(**ids("a"))]


def test_a_colocated_instance_does_everything():
    story = Story({C0: Role.COLOCATED})
    assert story.arrive("a") == [generate("a", C0, hand_over=False)]
    story.emit(C0, "a")
    assert story.loads() == {C0: (0, 11)}
    assert only(story.emit(C0, "a", finished=True), Finish) == Finish(**ids("a"))


def test_prefill_goes_where_least_tokens_wait_to_be_prefilled():
    story = Story(TWO_AND_TWO)
    assert story.arrive("long", num_tokens=50) == [generate("long", P0)]
    assert story.arrive("short", num_tokens=20) == [generate("short", P1)]
    assert story.arrive("another", num_tokens=20) == [generate("another", P1)]
    assert story.arrive("tie", num_tokens=10) == [generate("tie", P1)]


def test_decode_goes_where_least_kv_tokens_are():
    story = Story(TWO_AND_TWO)
    assert story.until_offered("a", num_tokens=50) == [SendAdopt(**ids("a"), instance=D0)]
    story.pulled(D0, "a")
    assert story.until_offered("b", num_tokens=60) == [SendAdopt(**ids("b"), instance=D1)]
    story.pulled(D1, "b")
    story.emit(D0, "a", num_tokens=20)  # a has grown past b
    assert story.until_offered("c") == [SendAdopt(**ids("c"), instance=D1)]


def test_tokens_that_are_told_of_in_sum_weigh_like_others_until_they_are_told_of_one_by_one():
    story = Story(TWO_AND_TWO)
    story.until_offered("a", num_tokens=50)
    story.pulled(D0, "a")
    story.until_offered("b", num_tokens=60)
    story.pulled(D1, "b")
    story.send(TokensEmitted(instance=D0, progress=(), num_untold=20))
    assert story.loads()[D0] == (0, 50 + 1 + 20)
    assert story.until_offered("c") == [SendAdopt(**ids("c"), instance=D1)]
    story.emit(D0, "a", num_tokens=30, finished=True)
    assert story.loads()[D0] == (0, 0)


def test_with_both_kinds_of_path_the_less_loaded_one_is_taken():
    story = Story({**ONE_AND_ONE, C0: Role.COLOCATED})
    assert story.arrive("a") == [generate("a", P0)]  # tie: the pair
    assert story.arrive("b") == [generate("b", C0, hand_over=False)]
    assert story.arrive("c", num_tokens=5) == [generate("c", P0)]


@pytest.mark.parametrize("state", ["prefilling", "offering", "pulling", "decoding"])
def test_cancelling_tells_whoever_holds_or_leases(pair, state):
    pair.arrive("a")
    expected = [SendAbort(**ids("a"), instance=P0), Finish(**ids("a"))]
    if state != "prefilling":
        pair.emit(P0, "a")
    if state in ("pulling", "decoding"):
        pair.offer(P0, "a")
        expected = [SendAbort(**ids("a"), instance=D0), SendRelease(**ids("a"), instance=P0), Finish(**ids("a"))]
    if state == "decoding":
        pair.pulled(D0, "a")
        expected = [SendAbort(**ids("a"), instance=D0), Finish(**ids("a"))]
    assert pair.cancel("a") == expected
    assert pair.loads() == {P0: (0, 0), D0: (0, 0)}
    assert pair.cancel("a") == []  # it is forgotten


def test_cancelling_while_it_waits_for_a_decode_instance_ends_the_lease(pair):
    pair.down(D0)
    assert pair.until_offered("a") == []
    assert pair.cancel("a") == [SendRelease(**ids("a"), instance=P0), Finish(**ids("a"))]


def test_what_is_said_about_a_forgotten_sequence_is_dropped(pair):
    pair.arrive("a")
    pair.cancel("a")
    dropped = Drop(**ids("a"), instance=P0)
    assert pair.emit(P0, "a") == [dropped]
    assert pair.offer(P0, "a") == [dropped, SendRelease(**ids("a"), instance=P0)]  # nobody will read those blocks


def test_an_old_epoch_is_dropped(pair):
    pair.arrive("a")
    assert pair.emit(P0, "a", epoch=7) == [Drop(request_id=RequestId("a"), epoch=Epoch(7), instance=P0)]
    assert pair.cancel("a", epoch=7) == []
    assert pair.dispatcher.num_sequences == 1


def test_an_instance_that_does_not_hold_a_sequence_has_no_say(pair):
    pair.arrive("a")
    assert pair.emit(D0, "a") == [Drop(**ids("a"), instance=D0)]


def test_an_impossible_event_raises_with_the_story(pair):
    pair.arrive("a")
    with pytest.raises(InternalError, match=r"a pull by prefill-0; its story.*arrived.*starts on"):
        pair.pulled(P0, "a")
    assert pair.emit(P0, "a") == [Deliver(request_ids=(RequestId("a"),))]  # the sequence is as it was


def test_a_second_token_from_the_prefill_instance_is_a_fault(pair):
    pair.arrive("a")
    pair.emit(P0, "a")
    with pytest.raises(InternalError, match="more tokens from prefill-0"):
        pair.emit(P0, "a")


def test_submitting_an_id_twice_is_a_fault(pair):
    pair.arrive("a")
    with pytest.raises(InternalError, match="submitted twice"):
        pair.arrive("a")


def test_more_than_the_bound_is_refused():
    story = Story(ONE_AND_ONE, settings=RouterSettings(max_queued_requests=2))
    story.arrive("a")
    story.arrive("b")
    refusal = only(story.arrive("c"), Refuse)
    assert refusal.reason is RefuseReason.OVERLOADED
    assert "2 sequences" in refusal.detail
    story.cancel("a")
    assert story.arrive("c") == [generate("c", P0)]


def resume(name: str, why: str, epoch: int = 1) -> Resume:
    return Resume(request_id=RequestId(name), epoch=Epoch(epoch), why=f"{why} died: killed by SIGKILL")


def test_what_a_dead_prefill_instance_held_starts_again_from_its_known_tokens():
    story = Story(TWO_AND_TWO)
    story.arrive("prefilling")
    story.arrive("other")
    story.arrive("offering")
    story.emit(P0, "offering")
    assert story.down(P0)[:3] == [SendPeerLost(instance=name, lost=P0) for name in (P1, D0, D1)]
    assert story.loads()[P0] == (0, 0)
    assert story.loads()[P1] == (10 + 10 + 11, 0)


def test_a_resumed_sequence_is_placed_in_a_new_epoch():
    story = Story(TWO_AND_TWO)
    story.arrive("a")
    lost = story.down(P0)[3:]
    again = SendGenerate(request_id=RequestId("a"), epoch=Epoch(1), instance=P1, hand_over=True)
    assert lost == [resume("a", P0), again]
    assert story.emit(P1, "a", epoch=0) == [Drop(request_id=RequestId("a"), epoch=Epoch(0), instance=P1)]
    assert story.emit(P1, "a", epoch=1) == [Deliver(request_ids=(RequestId("a"),))]
    assert only(story.offer(P1, "a", epoch=1), SendAdopt).epoch == 1


def test_a_sequence_that_lost_its_decode_instance_is_prefilled_with_its_answer(pair):
    pair.until_offered("a")
    pair.pulled(D0, "a")
    pair.emit(D0, "a", num_tokens=5)
    assert pair.down(D0)[1:] == [
        resume("a", D0),
        SendGenerate(request_id=RequestId("a"), epoch=Epoch(1), instance=P0, hand_over=True),
    ]
    assert pair.loads() == {P0: (16, 0), D0: (0, 0)}


def test_where_no_prefill_instance_is_up_a_decode_instance_computes_all_of_a_resumed_sequence(pair):
    pair.arrive("a")
    pair.emit(P0, "a")
    assert pair.down(P0)[1:] == [
        resume("a", P0),
        SendGenerate(request_id=RequestId("a"), epoch=Epoch(1), instance=D0, hand_over=False),
    ]
    assert only(pair.emit(D0, "a", finished=True, epoch=1), Finish).epoch == 1


def test_a_resumed_sequence_too_long_for_a_prefill_instance_goes_to_a_decode_instance():
    story = Story({P0: Role.PREFILL, D0: Role.DECODE, D1: Role.DECODE})
    story.send(InstanceDown(instance=P0, returning=True, detail=""))
    story.up(P0, capacity=20)
    story.until_offered("a")
    story.emit(D0, "a", num_tokens=30)
    assert only(story.down(D0), SendGenerate) == SendGenerate(
        request_id=RequestId("a"), epoch=Epoch(1), instance=D1, hand_over=False
    )


def test_an_offer_whose_lease_died_before_anybody_could_adopt_it_is_computed_again():
    story = Story({P0: Role.PREFILL, P1: Role.PREFILL, D0: Role.DECODE})
    story.down(D0)
    story.until_offered("a")
    assert only(story.down(P0), SendGenerate).instance == P1


def test_a_sequence_that_was_on_two_instances_that_died_fails_with_its_story():
    story = Story(TWO_AND_TWO)
    story.arrive("a")
    story.down(P0)
    story.now += 1.5
    failure = only(story.down(P1), Fail)
    assert (failure.reason, failure.epoch) == (FailReason.INSTANCE_LOST, 1)
    assert "2 instance(s)" in failure.detail
    assert "--max-instance-losses" in failure.detail
    assert "prefill-0 died 0.000 s after its arrival: killed by SIGKILL" in failure.detail
    assert "prefill-1 died 1.500 s after its arrival: killed by SIGKILL" in failure.detail


def test_the_number_of_losses_is_a_setting():
    story = Story(TWO_AND_TWO, settings=RouterSettings(max_instance_losses=1))
    story.arrive("a")
    assert only(story.down(P0), Fail).reason is FailReason.INSTANCE_LOST


def test_whoever_leaves_ends_every_later_attempt(pair):
    pair.arrive("a")
    pair.down(P0)
    abort, finish = pair.cancel("a", epoch=0)
    assert abort == SendAbort(request_id=RequestId("a"), epoch=Epoch(1), instance=D0)
    assert finish == Finish(request_id=RequestId("a"), epoch=Epoch(1))


def test_a_step_that_cannot_be_true_counts_no_token_of_other_sequences(pair):
    pair.arrive("a")
    pair.arrive("b")
    pair.emit(P0, "b")
    progress = tuple(Progress(RequestId(name), Epoch(0), 1, False) for name in ("a", "b"))
    with pytest.raises(InternalError, match="more tokens"):
        pair.send(TokensEmitted(instance=P0, progress=progress))
    pair.down(P0)
    assert pair.loads()[D0] == (10 + 11, 0)


def test_a_pull_from_a_dead_prefill_instance_is_left_to_the_decode_instance(pair):
    pair.until_offered("a")
    assert pair.down(P0) == [SendPeerLost(instance=D0, lost=P0)]
    assert pair.pulled(D0, "a") == []  # nobody is left to be told
    assert only(pair.emit(D0, "a", finished=True), Finish) == Finish(**ids("a"))


def test_a_returned_prefill_instance_is_not_told_about_leases_of_its_former_life(pair):
    pair.until_offered("a")
    pair.down(P0)
    pair.up(P0)
    assert pair.pulled(D0, "a") == []


def test_leases_of_a_dead_decode_instance_are_released(pair):
    pair.until_offered("pulling")
    pair.until_offered("decoding")
    pair.pulled(D0, "decoding")
    actions = pair.down(D0)
    assert [action for action in actions if isinstance(action, SendRelease)] == [
        SendRelease(**ids("pulling"), instance=P0)
    ]
    assert {action.request_id for action in actions if isinstance(action, Resume)} == {"pulling", "decoding"}
    assert pair.loads() == {P0: (22, 0), D0: (0, 0)}


def test_an_offer_waits_for_a_decode_instance_that_is_being_restarted(pair):
    pair.down(D0)
    assert pair.until_offered("a") == []
    pair.now += 2.0
    assert pair.up(D0) == [SendAdopt(**ids("a"), instance=D0, answer_age_s=2.0)]


def test_waiting_for_an_instance_is_bounded():
    story = Story(ONE_AND_ONE, settings=RouterSettings(instance_wait_s=20.0))
    story.down(D0)
    story.until_offered("a")
    story.now += 19.0
    assert story.send(Tick()) == []
    story.now += 1.0
    release, failure = story.send(Tick())
    assert release == SendRelease(**ids("a"), instance=P0)
    assert failure.reason is FailReason.UNAVAILABLE
    assert "20 s" in failure.detail
    assert "decode-0: lost" in failure.detail


def test_nothing_waits_for_an_instance_that_was_given_up(pair):
    pair.down(D0)
    pair.until_offered("a")
    assert only(pair.down(D0, returning=False), Fail).reason is FailReason.UNAVAILABLE
    assert only(pair.arrive("b"), Refuse).reason is RefuseReason.UNAVAILABLE


def test_a_sequence_being_prefilled_fails_when_no_decode_instance_is_left(pair):
    pair.arrive("a")
    pair.down(D0, returning=False)
    pair.emit(P0, "a")
    release, failure = pair.offer(P0, "a")
    assert release == SendRelease(**ids("a"), instance=P0)
    assert failure.reason is FailReason.UNAVAILABLE


def test_arrivals_wait_while_instances_load_and_start_by_priority_then_arrival():
    story = Story(ONE_AND_ONE, up=False)
    assert story.arrive("first") == []
    assert story.arrive("second") == []
    assert story.arrive("urgent", priority=-1) == []
    story.up(D0)
    assert story.up(P0) == [generate("urgent", P0), generate("first", P0), generate("second", P0)]


def test_a_live_colocated_instance_is_better_than_waiting_for_a_decode_instance():
    story = Story({**ONE_AND_ONE, C0: Role.COLOCATED})
    story.down(D0)
    story.arrive("a", num_tokens=500, max_total_tokens=600)
    assert story.arrive("b") == [generate("b", C0, hand_over=False)]


def test_the_deadline_aborts():
    story = Story(ONE_AND_ONE, settings=RouterSettings(request_timeout_s=60.0))
    story.arrive("a")
    story.now += 60.0
    abort, failure = story.send(Tick())
    assert abort == SendAbort(**ids("a"), instance=P0)
    assert failure.reason is FailReason.TIMEOUT
    assert "60 s" in failure.detail


def test_wake_ups_are_asked_for_the_earliest_deadline_once():
    dispatcher = Story(ONE_AND_ONE, settings=RouterSettings(request_timeout_s=60.0)).dispatcher

    def arrive(name: str, now: float) -> list[AnyDispatchAction]:
        event = SequenceArrived(**ids(name), num_tokens=1, max_total_tokens=9)
        return [action for action in dispatcher.handle(event, now) if isinstance(action, WakeAt)]

    assert arrive("a", 0.0) == [WakeAt(time_s=60.0)]
    assert arrive("b", 1.0) == []
    assert only(dispatcher.handle(Tick(), 60.0), WakeAt) == WakeAt(time_s=61.0)


def test_a_sequence_that_no_pool_holds_fails_with_the_sizes(pair):
    failure = only(pair.arrive("a", max_total_tokens=CAPACITY + 1), Fail)
    assert failure.reason is FailReason.TOO_LONG
    assert "1001 tokens" in failure.detail
    assert "holds 1000 tokens" in failure.detail


def test_a_prefill_pool_need_only_hold_the_prompt():
    story = Story(ONE_AND_ONE, up=False)
    story.up(P0, capacity=50)
    story.up(D0, capacity=500)
    assert story.arrive("a", num_tokens=40, max_total_tokens=400) == [generate("a", P0)]


def test_sizes_that_become_known_later_count_too():
    story = Story(ONE_AND_ONE, up=False)
    story.arrive("a", max_total_tokens=400)
    story.up(P0, capacity=50)
    story.emit(P0, "a")
    story.up(D0, capacity=300)
    release, failure = story.offer(P0, "a")
    assert release == SendRelease(**ids("a"), instance=P0)
    assert failure.reason is FailReason.TOO_LONG


def test_a_long_sequence_goes_to_the_decode_instance_that_can_hold_it():
    story = Story(TWO_AND_TWO, up=False)
    for name, capacity in ((P0, 100), (P1, 100), (D0, 100), (D1, 500)):
        story.up(name, capacity)
    assert story.until_offered("a", max_total_tokens=400) == [SendAdopt(**ids("a"), instance=D1)]


def test_an_instance_may_give_a_sequence_back(pair):
    pair.until_offered("a")
    event = SequenceFailed(**ids("a"), instance=D0, kind=FailureKind.INTERNAL, detail="kernel fault")
    assert pair.send(event) == [
        SendRelease(**ids("a"), instance=P0),
        Fail(**ids("a"), reason=FailReason.INTERNAL, detail="kernel fault"),
    ]
    assert pair.send(event) == [Drop(**ids("a"), instance=D0)]


def test_coming_up_twice_is_a_fault(pair):
    with pytest.raises(InternalError, match="came up twice"):
        pair.up(P0)


def test_an_unknown_instance_is_a_fault(pair):
    with pytest.raises(InternalError, match="decode-1"):
        pair.up(D1)
