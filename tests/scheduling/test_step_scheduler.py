"""The step scheduler's policies: feed events, compare actions. No engine, no clock."""

from collections.abc import Sequence

import pytest

from disagg.base.config import SchedulerSettings, SchedulingMode
from disagg.base.errors import InternalError
from disagg.base.ids import BlockHash, BlockId, Epoch, InstanceId, RequestId
from disagg.base.messages import FailureKind
from disagg.base.sampling import FinishReason
from disagg.scheduling.step.actions import AnyAction, Emit, Forget, OfferKv, Pull, Reject, ReleaseLease, RunStep, WakeAt
from disagg.scheduling.step.events import (
    AnyEvent,
    Arrived,
    Cancelled,
    KvOffered,
    LeaseReleased,
    SourceLost,
    StepDone,
    StepFailure,
    StepResult,
    Tick,
    TransferDone,
    TransferEnded,
    TransferFailed,
)
from disagg.scheduling.step.scheduler import StepScheduler

BLOCK = 4
P0 = InstanceId("prefill-0")


class Driver:
    """A scheduler, the time, and the step that runs. It validates the books after every event."""

    def __init__(
        self, num_blocks: int = 64, prefix_caching: bool = False, num_stages: int = 1, **settings: object
    ) -> None:
        chosen = {"max_batch_tokens": 16, "max_batch_size": 8, "lease_s": 100.0, **settings}
        self.scheduler = StepScheduler(
            SchedulerSettings(**chosen),  # type: ignore[arg-type]
            num_blocks,
            BLOCK,
            prefix_caching,
            num_stages=num_stages,
        )
        self.now = 0.0
        self.step: RunStep | None = None

    def feed(self, *events: AnyEvent) -> list[AnyAction]:
        self.now += 1.0
        actions = self.scheduler.handle(events, self.now)
        self.scheduler.validate()
        self.step = next((action for action in actions if isinstance(action, RunStep)), self.step)
        return actions

    def end_step(self, *failed: str, **finished: FinishReason) -> list[AnyAction]:
        assert self.step is not None, "no step is running"
        results = tuple(
            StepResult(chunk.request_id, finished.get(chunk.request_id))
            for chunk in self.step.chunks
            if chunk.samples and chunk.request_id not in failed
        )
        failures = tuple(StepFailure(RequestId(name), FailureKind.INTERNAL, "bad") for name in failed)
        step_id, self.step = self.step.step_id, None
        return self.feed(StepDone(step_id=step_id, results=results, failed=failures))

    @property
    def plan(self) -> dict[str, int]:
        return {chunk.request_id: chunk.num_tokens for chunk in self.step.chunks} if self.step else {}


def arrived(name: str, num_tokens: int, max_new: int = 8, **fields: object) -> Arrived:
    return Arrived(
        request_id=RequestId(name),
        epoch=Epoch(1),
        num_tokens=num_tokens,
        max_total_tokens=num_tokens + max_new,
        **fields,  # type: ignore[arg-type]
    )


def offered(name: str, num_tokens: int, expires_s: float = 1e9, **fields: object) -> KvOffered:
    num_blocks = -(-num_tokens // BLOCK)
    return KvOffered(
        request_id=RequestId(name),
        epoch=Epoch(1),
        num_tokens=num_tokens + 1,
        max_total_tokens=num_tokens + 8,
        source=P0,
        source_blocks=tuple(BlockId(10 + n) for n in range(num_blocks)),
        num_kv_tokens=num_tokens,
        expires_s=expires_s,
        **fields,  # type: ignore[arg-type]
    )


def of_type(actions: Sequence[AnyAction], kind: type) -> list[AnyAction]:
    return [action for action in actions if isinstance(action, kind)]


def done(name: str) -> TransferDone:
    return TransferDone(request_id=RequestId(name), epoch=Epoch(1))


class TestChunked:
    def test_a_prompt_is_cut_to_the_token_budget_and_samples_with_its_last_chunk(self) -> None:
        driver = Driver()
        driver.feed(arrived("a", 20))
        assert driver.plan == {"a": 16}
        assert driver.step is not None
        assert not driver.step.chunks[0].samples
        assert of_type(driver.end_step(), Emit) == []
        assert driver.plan == {"a": 4}
        assert of_type(driver.end_step(), Emit) == [Emit(request_ids=(RequestId("a"),))]

    def test_running_decodes_get_their_token_before_prompts_fill_the_rest(self) -> None:
        driver = Driver()
        driver.feed(arrived("a", 3))
        driver.feed(arrived("b", 40))
        driver.end_step()
        assert driver.plan == {"a": 1, "b": 15}

    def test_events_of_one_moment_share_a_step(self) -> None:
        driver = Driver()
        driver.feed(arrived("a", 3), arrived("b", 4))
        assert driver.plan == {"a": 3, "b": 4}

    def test_lower_priority_values_are_served_first(self) -> None:
        driver = Driver()
        driver.feed(arrived("late", 16, priority=5), arrived("urgent", 16, priority=-1))
        assert driver.plan == {"urgent": 16}


class TestOtherModes:
    def test_prefill_first_stops_decodes_for_a_whole_prompt(self) -> None:
        driver = Driver(scheduling=SchedulingMode.PREFILL_FIRST)
        driver.feed(arrived("a", 3))
        driver.feed(arrived("b", 12))
        driver.end_step()
        assert driver.plan == {"b": 12}
        driver.end_step()
        assert driver.plan == {"a": 1, "b": 1}

    def test_a_prompt_longer_than_the_budget_goes_alone_and_whole(self) -> None:
        driver = Driver(scheduling=SchedulingMode.PREFILL_FIRST)
        driver.feed(arrived("a", 40), arrived("b", 3))
        assert driver.plan == {"a": 40}

    def test_decode_first_starts_no_prompt_while_anything_decodes(self) -> None:
        driver = Driver(scheduling=SchedulingMode.DECODE_FIRST)
        driver.feed(arrived("a", 3))
        driver.feed(arrived("b", 3))
        driver.end_step()
        assert driver.plan == {"a": 1}
        driver.end_step(a=FinishReason.STOP)
        assert driver.plan == {"b": 3}

    def test_two_steps_in_flight_of_a_pipeline_hold_different_sequences(self) -> None:
        driver = Driver(max_steps_in_flight=2, num_stages=2)
        driver.feed(arrived("a", 3))
        actions = driver.feed(arrived("b", 3))
        second = of_type(actions, RunStep)
        assert [chunk.request_id for step in second for chunk in step.chunks] == ["b"]  # type: ignore[attr-defined]


class TestStepsInFlight:
    """A second step is planned while the first runs, with tokens that nobody knows yet."""

    def steps(self, actions: list[AnyAction]) -> list[tuple[int, list[tuple[str, int, int, bool]]]]:
        return [
            (step.step_id, [(c.request_id, c.start, c.num_tokens, c.samples) for c in step.chunks])
            for step in actions
            if isinstance(step, RunStep)
        ]

    def done(self, driver: Driver, step_id: int, *names: str, **finished: FinishReason) -> list[AnyAction]:
        results = tuple(StepResult(RequestId(name), finished.get(name)) for name in names)
        return driver.feed(StepDone(step_id=step_id, results=results))

    def test_all_decodes_take_part_in_both(self) -> None:
        driver = Driver(max_steps_in_flight=2)
        first = driver.feed(arrived("a", 3), arrived("b", 2))
        assert self.steps(first) == [
            (1, [("a", 0, 3, True), ("b", 0, 2, True)]),
            (2, [("a", 3, 1, True), ("b", 2, 1, True)]),
        ]
        assert self.steps(self.done(driver, 1, "a", "b")) == [(3, [("a", 4, 1, True), ("b", 3, 1, True)])]

    @pytest.mark.parametrize(("fixed", "third"), [(True, ["a", "c", "d"]), (False, ["a", "c"])])
    def test_a_pipeline_shares_its_decodes_evenly_or_keeps_them_where_they_joined(
        self, fixed: bool, third: list[str]
    ) -> None:
        driver = Driver(max_steps_in_flight=2, num_stages=2, max_pulls_in_flight=4, fixed_batches=fixed)

        def batches(actions: list[AnyAction]) -> list[list[str]]:
            return [[name for name, *_ in chunks] for _, chunks in self.steps(actions)]

        def join(name: str) -> list[list[str]]:
            driver.feed(offered(name, BLOCK))
            return batches(driver.feed(done(name)))

        assert [join(name) for name in "abc"] == [[["a"]], [["b"]], []]
        assert batches(self.done(driver, 1, "a")) == [["a", "c"]]
        assert batches(self.done(driver, 2, "b")) == [["b"]]
        assert join("d") == []
        assert batches(self.done(driver, 3, "a", "c")) == [third]

    def test_a_token_after_the_last_one_is_never_planned(self) -> None:
        driver = Driver(max_steps_in_flight=2)
        assert len(self.steps(driver.feed(arrived("a", 3, max_new=1)))) == 1
        assert len(self.steps(driver.feed(arrived("b", 3, hand_over=True)))) == 1

    def test_what_stops_early_is_thrown_away_and_its_blocks_come_back_when_the_step_has_ended(self) -> None:
        driver = Driver(max_steps_in_flight=2)
        driver.feed(arrived("a", 3))
        actions = self.done(driver, 1, "a", a=FinishReason.STOP)
        assert [type(action) for action in actions] == [Emit]
        assert driver.scheduler.audit().active == 1, "step 2 still writes"
        (forget,) = self.done(driver, 2, "a", a=FinishReason.STOP)
        assert isinstance(forget, Forget)
        assert forget.reason is FinishReason.STOP
        assert driver.scheduler.audit().free == 64

    def test_a_prompt_is_cut_over_both(self) -> None:
        driver = Driver(max_steps_in_flight=2)
        steps = self.steps(driver.feed(arrived("a", 20)))
        assert steps == [(1, [("a", 0, 16, False)]), (2, [("a", 16, 4, True)])]


class TestBlocks:
    def test_a_sequence_that_could_outgrow_the_pool_is_rejected_with_numbers(self) -> None:
        driver = Driver(num_blocks=4)
        (reject,) = driver.feed(arrived("a", 10, max_new=7))
        assert isinstance(reject, Reject)
        assert reject.detail == "the sequence can grow to 17 tokens, the instance's limit is 16"

    def test_the_latest_sequence_is_preempted_and_computed_again_with_what_it_generated(self) -> None:
        driver = Driver(num_blocks=4)
        driver.feed(arrived("a", 4, max_new=12), arrived("b", 4, max_new=12))
        driver.end_step()
        for _ in range(3):
            driver.end_step()
        assert driver.plan == {"a": 1, "b": 1}
        driver.end_step()  # both hold two full blocks now: one of them must give way
        assert driver.plan == {"a": 1}
        assert driver.scheduler.load().num_preemptions_total == 1
        driver.end_step(a=FinishReason.STOP)
        assert driver.plan == {"b": 9}

    def test_a_higher_priority_arrival_does_not_lose_its_blocks_to_a_lower_one(self) -> None:
        driver = Driver(num_blocks=4)
        driver.feed(arrived("low", 4, max_new=12, priority=9), arrived("high", 4, max_new=12))
        for _ in range(5):
            driver.end_step()
        assert driver.plan == {"high": 1}

    def test_an_equal_prefix_is_not_computed_again(self) -> None:
        driver = Driver(prefix_caching=True)
        hashes = (BlockHash(b"x"), BlockHash(b"y"))
        driver.feed(arrived("a", 8, block_hashes=hashes))
        driver.end_step(a=FinishReason.STOP)
        driver.feed(arrived("b", 8, block_hashes=hashes))
        # The last token is always computed, since its logits are needed: one block of the two is reused.
        assert driver.plan == {"b": 4}
        assert driver.scheduler.load().num_prefix_hits_total == 4

    def test_prompt_logprobs_need_every_position(self) -> None:
        driver = Driver(prefix_caching=True)
        hashes = (BlockHash(b"x"), BlockHash(b"y"))
        driver.feed(arrived("a", 8, block_hashes=hashes))
        driver.end_step(a=FinishReason.STOP)
        driver.feed(arrived("b", 8, block_hashes=hashes, reuse_prefix=False))
        assert driver.plan == {"b": 8}


class TestPrefillSide:
    def test_after_the_first_token_the_blocks_are_leased_and_offered(self) -> None:
        driver = Driver()
        driver.feed(arrived("a", 6, hand_over=True))
        emit, offer, wake = driver.end_step()
        assert isinstance(emit, Emit)
        assert isinstance(offer, OfferKv)
        assert (offer.num_tokens, len(offer.block_ids), offer.lease_s) == (6, 2, 100.0)
        assert isinstance(wake, WakeAt)
        assert driver.scheduler.audit().leased == 2

    def test_a_sequence_that_ends_with_its_first_token_is_never_offered(self) -> None:
        driver = Driver()
        driver.feed(arrived("a", 6, hand_over=True))
        actions = driver.end_step(a=FinishReason.STOP)
        assert of_type(actions, OfferKv) == []
        assert driver.scheduler.audit().free == 64

    def test_a_prompt_waits_for_blocks_until_a_lease_is_released(self) -> None:
        driver = Driver(num_blocks=2)
        driver.feed(arrived("a", 6, hand_over=True), arrived("b", 6, hand_over=True))
        driver.end_step()
        assert driver.plan == {}
        driver.feed(LeaseReleased(request_id=RequestId("a"), epoch=Epoch(2)))
        assert driver.plan == {}, "another epoch ends nothing"
        driver.feed(LeaseReleased(request_id=RequestId("a"), epoch=Epoch(1)))
        assert driver.plan == {"b": 6}

    def test_a_lease_that_nobody_reads_expires(self) -> None:
        driver = Driver(num_blocks=2)
        driver.feed(arrived("a", 6, hand_over=True))
        driver.end_step()
        driver.now += 200.0
        driver.feed(Tick())
        assert driver.scheduler.load().num_leases_expired_total == 1
        assert driver.scheduler.audit().free == 2


class TestDecodeSide:
    def test_an_offer_is_pulled_acknowledged_and_decoded(self) -> None:
        driver = Driver()
        actions = driver.feed(offered("a", 6))
        (pull,) = of_type(actions, Pull)
        assert isinstance(pull, Pull)
        assert [copy.source for copy in pull.copies] == [10, 11]
        assert driver.scheduler.audit().filling == 2
        actions = driver.feed(done("a"))
        assert of_type(actions, ReleaseLease) == [ReleaseLease(request_id=RequestId("a"), epoch=Epoch(1), source=P0)]
        assert driver.plan == {"a": 1}
        assert driver.step is not None
        assert driver.step.chunks[0].start == 6

    def test_nothing_is_pulled_without_room(self) -> None:
        driver = Driver(num_blocks=4)
        driver.feed(offered("a", 8), offered("b", 8))
        assert driver.scheduler.load().num_waiting == 2
        driver.feed(done("a"))
        assert driver.scheduler.audit().filling == 0
        actions = driver.end_step(a=FinishReason.STOP)
        assert [pull.request_id for pull in of_type(actions, Pull)] == ["b"]  # type: ignore[attr-defined]

    def test_a_failed_pull_is_computed_here_instead(self) -> None:
        driver = Driver()
        driver.feed(offered("a", 6))
        driver.feed(TransferFailed(request_id=RequestId("a"), epoch=Epoch(1)))
        assert driver.plan == {"a": 7}

    def test_blocks_of_a_pull_that_may_still_write_are_quarantined(self) -> None:
        driver = Driver()
        driver.feed(offered("a", 6))
        driver.feed(TransferFailed(request_id=RequestId("a"), epoch=Epoch(1), ended=False))
        assert driver.scheduler.audit().quarantined == 2
        driver.feed(TransferEnded(request_id=RequestId("a"), epoch=Epoch(1)))
        assert driver.scheduler.audit().quarantined == 0

    def test_an_offer_that_expired_while_it_waited_is_computed_here(self) -> None:
        driver = Driver(max_batch_size=1)
        driver.feed(offered("a", 6), offered("b", 6, expires_s=50.0))
        driver.feed(done("a"))
        driver.now = 60.0
        driver.feed(Tick())
        driver.end_step(a=FinishReason.STOP)
        assert driver.plan == {"b": 7}

    def test_a_pull_that_ends_after_the_lease_is_not_trusted(self) -> None:
        driver = Driver()
        driver.feed(offered("a", 6, expires_s=50.0))
        driver.now = 60.0
        driver.feed(done("a"))
        assert driver.plan == {"a": 7}

    def test_what_a_lost_peer_offered_is_computed_here(self) -> None:
        driver = Driver(max_batch_size=1)
        driver.feed(offered("a", 6), offered("b", 6))
        driver.feed(SourceLost(instance=P0))
        driver.feed(done("a"))
        driver.end_step(a=FinishReason.STOP)
        assert driver.plan == {"b": 7}

    def test_blocks_known_by_prefix_are_not_copied_again(self) -> None:
        driver = Driver(prefix_caching=True)
        hashes = (BlockHash(b"x"),)
        driver.feed(offered("a", 6, block_hashes=hashes))
        driver.feed(done("a"))
        driver.end_step(a=FinishReason.STOP)
        (pull,) = of_type(driver.feed(offered("b", 6, block_hashes=hashes)), Pull)
        assert isinstance(pull, Pull)
        assert [copy.source for copy in pull.copies] == [11]

    def test_an_offer_with_the_wrong_number_of_blocks_is_computed_here(self) -> None:
        driver = Driver()
        driver.feed(
            KvOffered(
                **{
                    **{f: getattr(offered("a", 6), f) for f in KvOffered.__struct_fields__},
                    "source_blocks": (BlockId(1),),
                }
            )
        )
        assert driver.plan == {"a": 7}


class TestFailure:
    def test_a_sequence_that_failed_ends_alone(self) -> None:
        driver = Driver()
        driver.feed(arrived("a", 3), arrived("b", 4), arrived("c", 5))
        emit, finish, _ = driver.end_step("b")
        assert emit == Emit(request_ids=(RequestId("a"), RequestId("c")))
        assert finish == Forget(request_id=RequestId("b"), epoch=Epoch(1), reason=FinishReason.ERROR)
        assert driver.plan == {"a": 1, "c": 1}
        driver.end_step(a=FinishReason.STOP, c=FinishReason.STOP)
        assert driver.scheduler.audit().free == 64

    def test_it_may_fail_before_it_samples(self) -> None:
        driver = Driver()
        driver.feed(arrived("a", 40))
        assert of_type(driver.end_step("a"), Forget)
        assert driver.plan == {}

    def test_a_handed_over_sequence_that_failed_is_not_offered(self) -> None:
        driver = Driver()
        driver.feed(arrived("a", 6, hand_over=True))
        assert [type(action) for action in driver.end_step("a")] == [Forget]

    def test_what_it_computed_is_reused_by_nobody(self) -> None:
        driver = Driver(prefix_caching=True)
        hashes = tuple(BlockHash(bytes([n])) for n in range(6))
        driver.feed(arrived("a", 24, block_hashes=hashes))
        driver.end_step()  # publishes four blocks of the first 16 tokens
        driver.end_step("a")
        driver.feed(arrived("b", 24, block_hashes=hashes))
        assert driver.plan == {"b": 16}
        assert driver.scheduler.audit().cached == 0

    def test_one_that_was_cancelled_meanwhile_ends_as_cancelled(self) -> None:
        driver = Driver()
        driver.feed(arrived("a", 3))
        driver.feed(Cancelled(request_id=RequestId("a"), epoch=Epoch(1)))
        (finish,) = of_type(driver.end_step("a"), Forget)
        assert isinstance(finish, Forget)
        assert finish.reason is FinishReason.ABORT


class TestCancel:
    def cancel(self, name: str) -> Cancelled:
        return Cancelled(request_id=RequestId(name), epoch=Epoch(1))

    def assert_empty(self, driver: Driver) -> None:
        assert driver.scheduler.audit().free == 64
        load = driver.scheduler.load()
        assert (load.num_running, load.num_waiting, load.num_leases) == (0, 0, 0)

    def test_waiting(self) -> None:
        driver = Driver()
        driver.feed(arrived("a", 16), arrived("b", 16))
        (finish,) = of_type(driver.feed(self.cancel("b")), Forget)
        assert isinstance(finish, Forget)
        assert finish.reason is FinishReason.ABORT

    def test_in_a_step_that_runs_the_blocks_are_freed_when_it_ends(self) -> None:
        driver = Driver()
        driver.feed(arrived("a", 16))
        assert of_type(driver.feed(self.cancel("a")), Forget) == []
        assert driver.scheduler.audit().active == 6 - 2
        actions = driver.end_step()
        assert of_type(actions, Emit) == []
        assert len(of_type(actions, Forget)) == 1
        self.assert_empty(driver)

    def test_offered(self) -> None:
        driver = Driver(max_batch_size=1)
        driver.feed(offered("a", 6), offered("b", 6))
        actions = driver.feed(self.cancel("b"))
        assert len(of_type(actions, ReleaseLease)) == 1

    def test_while_pulling_the_targets_stay_quarantined_until_the_copy_ended(self) -> None:
        driver = Driver()
        driver.feed(offered("a", 6))
        driver.feed(self.cancel("a"))
        assert driver.scheduler.audit().quarantined == 2
        driver.feed(done("a"))
        self.assert_empty(driver)

    def test_leased(self) -> None:
        driver = Driver()
        driver.feed(arrived("a", 6, hand_over=True))
        driver.end_step()
        driver.feed(self.cancel("a"))
        self.assert_empty(driver)

    def test_unknown_and_old_epochs_change_nothing(self) -> None:
        driver = Driver()
        driver.feed(arrived("a", 6))
        assert driver.feed(Cancelled(request_id=RequestId("a"), epoch=Epoch(0)), self.cancel("x")) == []
        assert driver.scheduler.load().num_running == 1


def test_a_newer_epoch_replaces_an_older_one_and_never_the_reverse() -> None:
    driver = Driver()
    driver.feed(arrived("a", 6, hand_over=True))
    driver.end_step()
    newer = Arrived(request_id=RequestId("a"), epoch=Epoch(2), num_tokens=6, max_total_tokens=8)
    driver.feed(newer)
    assert driver.scheduler.load().num_leases == 0
    assert driver.feed(arrived("a", 6)) == []


def test_time_never_goes_back() -> None:
    driver = Driver()
    driver.feed(Tick())
    with pytest.raises(InternalError, match="time went back"):
        driver.scheduler.handle([Tick()], 0.5)


def test_of_plain_tokens_a_step_says_nothing() -> None:
    driver = Driver()
    driver.feed(arrived("a", 3), arrived("b", 3))
    assert driver.step is not None
    actions = driver.feed(StepDone(step_id=driver.step.step_id, results=()))
    assert of_type(actions, Emit) == [Emit(request_ids=(RequestId("a"), RequestId("b")))]
    assert driver.plan == {"a": 1, "b": 1}


def test_a_step_reports_no_sequence_that_took_no_part() -> None:
    driver = Driver()
    driver.feed(arrived("a", 3))
    assert driver.step is not None
    with pytest.raises(InternalError, match="results for b, which took no part"):
        driver.scheduler.handle([StepDone(step_id=driver.step.step_id, results=(StepResult(RequestId("b")),))], 9.0)
