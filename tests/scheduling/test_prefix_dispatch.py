"""Dispatch by what instances hold: told to the router's core as short stories."""

import pytest
from instance_facts import FACTS
from msgspec import structs

from disagg.base.block_hash import hash_blocks
from disagg.base.cache_routing import CacheRouting
from disagg.base.config import RouterSettings
from disagg.base.ids import BlockId, Epoch, InstanceId, RequestId
from disagg.base.kv_events import BlockStored, Medium
from disagg.base.message_fields import PROTOCOL_VERSION
from disagg.base.messages import KvEvents, KvOffer, NotHeld, Offered, Pulled, Ready
from disagg.base.request import Role
from disagg.base.service_classes import Overload
from disagg.scheduling.dispatch.actions import Finish, Resume, SendGenerate, SendLend, SendRelease
from disagg.scheduling.dispatch.events import Progress, SequenceArrived, SequenceCancelled, TokensEmitted
from disagg.scheduling.router.core import RouterCore
from disagg.scheduling.router.header import RouterHeader
from disagg.scheduling.router.inputs import AnyRouterInput, InstanceSaid, ProcessExited
from disagg.scheduling.router.outputs import AnyRouterOutput, AskForBlocks, EndInstance, SendOffer, SendWithPrefix
from disagg.scheduling.step.actions import WakeAt

P0, P1, D0, D1, C0, C1 = (
    InstanceId(name) for name in ("prefill-0", "prefill-1", "decode-0", "decode-1", "colocated-0", "colocated-1")
)
SIZE = 64
PROMPT = tuple(range(4096))
NAMES = hash_blocks(PROMPT, SIZE)


class Story:
    """A core of ready instances. Its books are checked after every input."""

    def __init__(self, *instances: InstanceId, **settings: object) -> None:
        roles = {name: Role(name.partition("-")[0]) for name in instances}
        settings = {"instance_timeout_s": 1e6, **settings}
        self.core = RouterCore(RouterHeader(instances=roles, settings=RouterSettings(**settings)))  # type: ignore[arg-type]
        self.numbers = dict.fromkeys(instances, 0)
        self.now = 0.0
        for name, role in roles.items():
            self.ready(name, role)

    def tell(self, one: AnyRouterInput) -> list[AnyRouterOutput]:
        outputs = self.core.handle(one, self.now)
        self.core.validate()
        return [output for output in outputs if not isinstance(output, WakeAt)]

    def say(self, instance: InstanceId, message):
        return self.tell(InstanceSaid(instance=instance, message=message))

    def ready(self, instance: InstanceId, role: Role, num_saved_blocks: int = 0):
        facts = structs.replace(
            FACTS,
            num_blocks=1000,
            block_size=SIZE,
            max_model_len=60_000,
            max_disk_blocks=1000,
            num_saved_blocks=num_saved_blocks,
        )
        return self.say(
            instance, Ready(version=PROTOCOL_VERSION, instance=instance, incarnation="1", role=role, facts=facts)
        )

    def hold(self, instance: InstanceId, num_tokens: int, medium: Medium = Medium.CPU):
        event = BlockStored(NAMES[: num_tokens // SIZE], None, (), SIZE, None, medium)
        return self.say_events(instance, event)

    def say_events(self, instance: InstanceId, *events, skip: int = 0):
        number = self.numbers[instance] + skip
        self.numbers[instance] = number + 1
        return self.say(instance, KvEvents(instance=instance, incarnation="1", number=number, events=events))

    def arrive(self, name: str = "a", num_tokens: int = 4096):
        return self.tell(
            SequenceArrived(
                request_id=RequestId(name),
                epoch=Epoch(0),
                num_tokens=num_tokens,
                max_total_tokens=num_tokens + 100,
                block_hashes=NAMES[: num_tokens // SIZE],
                hash_block_size=SIZE,
            )
        )

    def burden(self, num_tokens: int) -> SendGenerate:
        """Let a sequence come of which nobody holds anything; return to whom it went."""
        name = f"burden-{self.core.num_sequences}"
        (sent,) = self.tell(
            SequenceArrived(
                request_id=RequestId(name), epoch=Epoch(0), num_tokens=num_tokens, max_total_tokens=num_tokens + 10
            )
        )
        assert isinstance(sent, SendGenerate)
        return sent

    def emit(self, instance: InstanceId, finished: bool = False):
        progress = (Progress(RequestId("a"), Epoch(0), 1, finished),)
        return self.tell(TokensEmitted(instance=instance, progress=progress))


IDS = {"request_id": RequestId("a"), "epoch": Epoch(0)}


def generate(instance: InstanceId, hand_over: bool) -> SendGenerate:
    return SendGenerate(**IDS, instance=instance, hand_over=hand_over)


def offer(source: InstanceId, num_tokens: int) -> KvOffer:
    blocks = tuple(map(BlockId, range(num_tokens // SIZE)))
    return KvOffer(
        **IDS,
        source=source,
        incarnation="1",
        num_tokens=num_tokens,
        block_size=SIZE,
        block_ids=blocks,
        lease_s=60.0,
        pool=b"",
    )


class TestAffinity:
    def test_the_instance_that_holds_the_prefix_is_chosen(self) -> None:
        story = Story(P0, P1, D0, cache_routing=CacheRouting.AFFINITY)
        story.hold(P1, 3072)
        assert story.arrive() == [generate(P1, hand_over=True)]

    def test_a_longer_queue_outweighs_what_it_holds(self) -> None:
        story = Story(P0, P1, D0, cache_routing=CacheRouting.AFFINITY)
        story.hold(P0, 3072)
        assert story.burden(3500).instance == P0  # a tie, and the first
        assert story.arrive() == [generate(P1, hand_over=True)]

    def test_colocated_instances_are_judged_the_same_way(self) -> None:
        story = Story(C0, C1, cache_routing=CacheRouting.AFFINITY)
        story.hold(C1, 3072)
        assert story.arrive() == [generate(C1, hand_over=False)]

    def test_the_decode_instance_that_holds_the_prefix_goes_on(self) -> None:
        story = Story(P0, D0, D1, cache_routing=CacheRouting.AFFINITY, append_turns=False)
        story.hold(D1, 3072)
        assert story.arrive() == [generate(P0, hand_over=True)]
        story.emit(P0)
        (sent,) = story.say(P0, Offered(offer=offer(P0, 4096)))
        assert isinstance(sent, SendOffer)
        assert sent.instance == D1

    def test_blind_dispatch_goes_by_load_alone(self) -> None:
        story = Story(P0, P1, D0, cache_routing=CacheRouting.BLIND)
        story.hold(P1, 3072)
        assert story.arrive() == [generate(P0, hand_over=True)]

    def test_a_life_that_ended_holds_nothing(self) -> None:
        story = Story(P0, P1, D0, cache_routing=CacheRouting.AFFINITY)
        story.hold(P1, 3072)
        story.tell(ProcessExited(instance=P1, detail="killed"))
        story.ready(P1, Role.PREFILL)
        assert story.arrive() == [generate(P0, hand_over=True)]


class TestNextTurn:
    def test_an_idle_decode_instance_that_holds_the_conversation_goes_on_by_itself(self) -> None:
        story = Story(P0, D0)
        story.hold(D0, 3072, Medium.DISK)
        assert story.arrive() == [generate(D0, hand_over=False)]
        assert story.emit(D0, finished=True)[-1] == Finish(**IDS)

    @pytest.mark.parametrize(("append_turns", "first"), [(True, D0), (False, P0)])
    def test_predictions_judge_it_like_any_path(self, append_turns: bool, first: InstanceId) -> None:
        story = Story(
            P0, D0, overload=Overload.BEST_EFFORT, append_turns=append_turns, cache_routing=CacheRouting.AFFINITY
        )
        story.hold(D0, 3072)
        (sent,) = [output for output in story.arrive() if isinstance(output, SendGenerate)]
        assert sent.instance == first

    def test_a_busy_one_leaves_it_to_a_prefill_instance_that_holds_nearly_as_much(self) -> None:
        story = Story(P0, D0)
        story.hold(D0, 3072)
        story.hold(P0, 2560)
        other = story.burden(1000)
        story.tell(TokensEmitted(instance=P0, progress=(Progress(other.request_id, Epoch(0), 1, False),)))
        story.say(P0, Offered(offer=_offer_of(other.request_id, P0, 1000)))
        assert story.arrive() == [SendLend(**IDS, instance=D0)]


class TestLoans:
    @pytest.fixture
    def story(self) -> Story:
        """Two prefill instances; the one with the longer queue holds the prefix, and the other borrows it."""
        story = Story(P0, P1, D0)
        story.hold(P0, 3072)
        assert story.burden(3500).instance == P0
        return story

    def test_a_prefix_is_lent_then_pulled_then_the_prompt_goes_on(self, story: Story) -> None:
        assert story.arrive() == [SendLend(**IDS, instance=P0)]
        lent = offer(P0, 3072)
        assert story.say(P0, Offered(offer=lent)) == [SendWithPrefix(**IDS, instance=P1, hand_over=True, prefix=lent)]
        pulled = Pulled(**IDS, source=P0, num_bytes=7, duration_s=0.1)
        assert story.say(P1, pulled)[-1] == SendRelease(**IDS, instance=P0)
        story.emit(P1)
        assert story.say(P1, Offered(offer=offer(P1, 4096))) == [SendOffer(**IDS, instance=D0, offer=offer(P1, 4096))]

    def test_who_lent_a_beginning_goes_on_with_the_whole(self) -> None:
        story = Story(P0, D0, append_turns=False)
        story.hold(D0, 3072)
        assert story.arrive() == [SendLend(**IDS, instance=D0)]
        story.say(D0, Offered(offer=offer(D0, 3072)))
        pulled = Pulled(**IDS, source=D0, num_bytes=7, duration_s=0.1)
        assert story.say(P0, pulled)[-1] == SendRelease(**IDS, instance=D0)
        story.emit(P0)
        assert story.say(P0, Offered(offer=offer(P0, 4096))) == [SendOffer(**IDS, instance=D0, offer=offer(P0, 4096))]

    def test_what_is_not_there_any_more_is_computed(self, story: Story) -> None:
        story.arrive()
        assert story.say(P0, NotHeld(**IDS))[-1] == generate(P1, hand_over=True)

    def test_a_lender_that_dies_is_not_waited_for(self, story: Story) -> None:
        story.arrive()
        outputs = story.tell(ProcessExited(instance=P0, detail="killed"))
        assert generate(P1, hand_over=True) in outputs

    def test_a_borrower_that_dies_before_it_was_told_is_no_loss_of_the_sequence(self, story: Story) -> None:
        story.arrive()
        outputs = story.tell(ProcessExited(instance=P1, detail="killed"))
        assert SendRelease(**IDS, instance=P0) in outputs
        (resumed,) = [output for output in outputs if isinstance(output, Resume)]
        assert resumed.epoch == 1
        # What the lender says of the first attempt is out of date: it takes its blocks back.
        assert SendRelease(**IDS, instance=P0) in story.say(P0, Offered(offer=offer(P0, 3072)))

    def test_a_cancelled_loan_is_given_back(self, story: Story) -> None:
        story.arrive()
        outputs = story.tell(SequenceCancelled(**IDS))
        assert SendRelease(**IDS, instance=P0) in outputs
        assert Finish(**IDS) in outputs


class TestEvents:
    def test_after_a_gap_the_instance_is_asked_for_all(self) -> None:
        story = Story(P0, D0)
        stored = BlockStored(NAMES[:1], None, (), SIZE)
        assert story.say_events(P0, stored, skip=1) == [AskForBlocks(instance=P0)]
        assert story.say_events(P0, stored) == []

    def test_an_instance_with_blocks_from_a_life_before_is_asked_for_them(self) -> None:
        story = Story(P0)
        story.tell(ProcessExited(instance=P0, detail="killed"))
        assert AskForBlocks(instance=P0) in story.ready(P0, Role.PREFILL, num_saved_blocks=3)

    def test_an_instance_that_claims_more_than_it_can_hold_is_ended(self) -> None:
        story = Story(P0, D0)
        many = hash_blocks(range(2001), 1)
        outputs = story.say_events(P0, BlockStored(many, None, (), SIZE))
        assert any(isinstance(output, EndInstance) and "more than the 2000 blocks" in output.why for output in outputs)


def _offer_of(request_id: RequestId, source: InstanceId, num_tokens: int) -> KvOffer:
    return KvOffer(
        request_id=request_id,
        epoch=Epoch(0),
        source=source,
        incarnation="1",
        num_tokens=num_tokens,
        block_size=SIZE,
        block_ids=(BlockId(0),),
        lease_s=60.0,
        pool=b"",
    )
