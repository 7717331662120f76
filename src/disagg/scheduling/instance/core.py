"""The core of one instance: messages and results in, messages and effects out. Two shells drive it, live and simulated.

It owns everything between a message and its consequences: which attempt of a sequence is current, what is refused and
why, what is computed, pulled and offered when, which pulls run at once, what the router is told, and the stamps of
each stage. A shell owns what a core may not touch: clock, sockets, devices, token values. As in dask's ``BaseWorker``.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Final

from disagg.base.by_type import by_type
from disagg.base.errors import InternalError
from disagg.base.ids import BlockHash, Epoch, RequestId, RouterId, owner_of
from disagg.base.kv_events import AnyKvEvent
from disagg.base.messages import (
    Abort,
    AuditBlocks,
    Audited,
    Failed,
    FailureKind,
    InstanceLoad,
    KvEvents,
    KvOffer,
    Lend,
    Migrate,
    MoreKv,
    NotHeld,
    Offered,
    PartOffered,
    PeerLost,
    Release,
    ReportBlocks,
)
from disagg.base.router_messages import ForeignLoad, LeaveRouter
from disagg.base.sampling import FinishReason
from disagg.cache.block_pool import BlockAudit
from disagg.cache.journal import Owner
from disagg.scheduling.instance.copy_queue import CopyQueue
from disagg.scheduling.instance.foreign_blocks import in_own_blocks, pieces
from disagg.scheduling.instance.header import InstanceHeader
from disagg.scheduling.instance.inputs import (
    AnyInstanceInput,
    Continue,
    CopyEnded,
    CopySettled,
    Expect,
    LoadEnded,
    SequenceFacts,
    Start,
)
from disagg.scheduling.instance.lessons import Lessons, given_times
from disagg.scheduling.instance.outputs import (
    AnyInstanceOutput,
    CacheChanged,
    CancelCopy,
    Emitted,
    FirstOutput,
    ForgetPeer,
    StartCopy,
)
from disagg.scheduling.instance.tracked import (
    Tracked,
    event_of,
    kv_extended,
    kv_offer,
    kv_offered,
    mismatch,
    pulled,
    unread,
)
from disagg.scheduling.step.actions import (
    AnyAction,
    DropSaved,
    Emit,
    Forget,
    LendKv,
    LoadBlocks,
    OfferKv,
    OfferPart,
    Pull,
    Reject,
    ReleaseLease,
    RunStep,
    SaveBlock,
    StopPull,
    WakeAt,
)
from disagg.scheduling.step.events import (
    AnyEvent,
    Arrived,
    BlockSaved,
    BlocksRead,
    Cancelled,
    LentKv,
    SourceLost,
    StepDone,
    Tick,
    TransferDone,
    TransferEnded,
    TransferFailed,
)
from disagg.scheduling.step.kv_ledger import KvMemory
from disagg.scheduling.step.scheduler import StepScheduler
from disagg.scheduling.step.statistics import Occupancy


class InstanceCore:
    """Not thread-safe; deterministic: equal inputs at equal times give equal outputs."""

    def __init__(self, header: InstanceHeader) -> None:
        self._header = header
        self._scheduler = StepScheduler(
            header.settings,
            header.num_blocks,
            header.block_size,
            header.prefix_caching,
            max_model_len=header.max_model_len,
            num_stages=header.num_stages,
            times=given_times(header),
            memory=KvMemory(header.medium, header.tiers(), header.window, header.shows_progress),
            threads=header.threads,
        )
        self._lessons = Lessons(header) if header.settings.tells_costs else None
        self._sequences: dict[RequestId, Tracked] = {}
        self._journal = self._scheduler.journal
        self._copies = CopyQueue(header.settings.max_pulls_in_flight)
        self._not_scheduled: set[RequestId] = set()
        """No step of theirs has begun here."""
        self._silent: set[RequestId] = set()
        """No token of theirs has come from here."""
        self._num_kv_events = 0
        self._audits: list[int] = []
        self._step_s, self._step_ended_s = 0.0, -math.inf
        """How long the last step took, and when that was told."""
        self._outputs: list[AnyInstanceOutput] = []
        self._now = -math.inf

    def handle(self, inputs: Sequence[AnyInstanceInput], now: float) -> list[AnyInstanceOutput]:
        """Take what happened up to ``now`` (seconds, never going back), in order, then decide once.

        Returns what to do, in order. Messages about unknown sequences or old attempts change nothing.
        """
        self._outputs = []
        self._now = now
        events: list[AnyEvent] = []
        for one in inputs:
            _TAKEN_BY[type(one)](self, one, events)
        outputs = self._outputs
        for action in self._scheduler.handle(events, now):
            _CARRIED_OUT_BY[type(action)](self, action)
        while self._copies.has_waiting and (copy := self._copies.start()) is not None:
            self._sequences[copy.request_id].pull_started_s = now
            outputs.append(copy)
        if self._lessons is not None and (lesson := self._lessons.due(self._scheduler.times)) is not None:
            outputs.append(lesson)
        if self._audits:
            self._tell_audits()
        if self._journal.has_news:
            self._tell_kv_events(*self._journal.take(), 0)
        return outputs

    @property
    def capacity(self) -> int:
        """Longest sequence that is taken, in tokens."""
        return self._scheduler.capacity

    @property
    def named_block_size(self) -> int:
        """Tokens of a KV block, where full ones are kept under their names for reuse; 0 where none is."""
        return self._header.block_size if self._header.prefix_caching else 0

    @property
    def num_held_blocks(self) -> int:
        """KV blocks that are neither free nor merely cached."""
        return self._scheduler.num_held_blocks

    @property
    def occupancy(self) -> Occupancy:
        """How many sequences are here."""
        return self._scheduler.occupancy

    def load(self) -> InstanceLoad:
        """Return how busy the instance is, and its counters."""
        return self._scheduler.load()

    def load_of_others(self, router: RouterId) -> ForeignLoad:
        """Return what of the load is not this router's."""
        return self._scheduler.load_of_others(router)

    def audit(self) -> BlockAudit:
        """Count the KV blocks of each state."""
        return self._scheduler.audit()

    def validate(self) -> None:
        """Raise InternalError unless all books agree."""
        self._scheduler.validate()

    def num_repeats(self) -> int:
        """See ``StepScheduler.num_repeats``."""
        return self._scheduler.num_repeats()

    def repeat(
        self, count: int, first_end_s: float, names: Mapping[RequestId, tuple[BlockHash, ...]], *, is_over: bool
    ) -> tuple[RunStep, tuple[FirstOutput, ...]]:
        """See ``StepScheduler.repeat``; the first of these steps ended at ``first_end_s``.

        Returns the step in flight, which is now the last repetition, and what goes with first tokens.
        """
        step, fresh = self._scheduler.repeat(count, names, is_over=is_over)
        return step, self._first_outputs(fresh, first_end_s) if fresh else ()

    def _on_asked(self, asked: ReportBlocks | AuditBlocks, events: list[AnyEvent]) -> None:
        if isinstance(asked, ReportBlocks):
            self._tell_kv_events(self._scheduler.all_cached(), (), len(self._outputs))
        else:
            self._audits.append(asked.number)  # answered once all that came with it has been taken account of

    def _tell_audits(self) -> None:
        header, load, faults = self._header, self.load(), self._scheduler.block_faults()
        for number in self._audits:
            self._outputs.append(
                Audited(
                    instance=header.instance, incarnation=header.incarnation, number=number, load=load, faults=faults
                )
            )
        self._audits = []

    # In: from messages and results to the scheduler's events --------------------------------------------------

    def _on_step_done(self, done: StepDone, events: list[AnyEvent]) -> None:
        for failure in done.failed:
            if (failing := self._sequences.get(failure.request_id)) is not None:
                failing.failure = failure
        self._step_s, self._step_ended_s = done.duration_s, self._now
        events.append(done)

    def _on_load_ended(self, ended: LoadEnded, events: list[AnyEvent]) -> None:
        events.append(BlocksRead(reads=ended.reads))
        make = TransferDone if ended.is_whole else TransferFailed
        events.append(make(request_id=ended.request_id, epoch=ended.epoch))

    def _on_others(
        self, one: Lend | Release | Migrate | CopySettled | BlockSaved | Tick, events: list[AnyEvent]
    ) -> None:
        events.append(event_of(one))

    def _on_abort(self, abort: Abort, events: list[AnyEvent]) -> None:
        self._abandon(abort.request_id, abort.epoch, events)

    def _on_start(self, message: Start, events: list[AnyEvent]) -> None:
        facts, offer = message.sequence, message.prefix
        if not self._admit(facts, offer, events):
            return
        prefix = None
        if offer is not None:
            tracked = self._sequences[facts.request_id]
            tracked.expires_s, tracked.is_offer_prefix = self._now + offer.lease_s, True
            lent = in_own_blocks(offer, self._header.block_size, ends_open=True)
            prefix = LentKv(lent.source, lent.block_ids, lent.num_tokens, tracked.expires_s)
        events.append(
            Arrived(
                request_id=facts.request_id,
                epoch=facts.epoch,
                num_tokens=facts.num_tokens,
                max_total_tokens=facts.max_total_tokens,
                priority=facts.priority,
                arrival_s=facts.arrival_s,
                hand_over=message.hand_over,
                block_hashes=facts.block_hashes,
                reuse_prefix=facts.reuse_prefix,
                prefix=prefix,
                objectives=facts.objectives,
            )
        )

    def _on_continue(self, message: Continue, events: list[AnyEvent]) -> None:
        facts, offer = message.sequence, message.offer
        expected = self._find(facts.request_id, facts.epoch)
        if expected is not None and expected.is_expected and not mismatch(offer, facts):
            expected.take_whole(offer, self._now)
        elif not self._admit(facts, offer, events):
            return
        tracked = self._sequences[facts.request_id]
        tracked.expires_s = self._now + offer.lease_s
        whole = in_own_blocks(offer, self._header.block_size)
        unread_s = self._step_s if self._step_ended_s == self._now else 0.0  # what came during a step was read after it
        age_s, is_sound = offer.answer_age_s + unread_s, tracked.is_sound()
        events.append(kv_offered(facts, whole, tracked.expires_s, is_whole=True, is_sound=is_sound, answer_age_s=age_s))

    def _on_expect(self, message: Expect, events: list[AnyEvent]) -> None:
        facts, offer = message.sequence, message.offer
        if not self._admit(facts, offer, events):
            return
        tracked = self._sequences[facts.request_id]
        tracked.offer = None
        events.append(kv_offered(facts, self._part(tracked, offer), self._now + offer.lease_s, is_whole=False))

    def _on_more(self, message: MoreKv, events: list[AnyEvent]) -> None:
        offer = message.offer
        tracked = self._find(offer.request_id, offer.epoch)
        if tracked is None or not tracked.is_expected:
            return
        events.append(kv_extended(self._part(tracked, offer), self._now + offer.lease_s))

    def _part(self, tracked: Tracked, offer: KvOffer) -> KvOffer:
        """Take note of a part that is offered, and return it as one of own blocks."""
        own = in_own_blocks(offer, self._header.block_size, ends_open=not offer.behind_step)
        tracked.parts[own.first_block] = offer
        return own

    def _admit(self, facts: SequenceFacts, offer: KvOffer | None, events: list[AnyEvent]) -> bool:
        """Open a record unless this is old news or cannot be computed; a newer attempt replaces an older one."""
        known = self._sequences.get(facts.request_id)
        if not self._scheduler.is_news(facts.request_id, facts.epoch) or (
            known is not None and known.epoch >= facts.epoch
        ):
            if known is None or known.epoch != facts.epoch:
                self._forget(facts.request_id, facts.epoch)
            return False
        if known is not None:
            self._abandon(known.request_id, known.epoch, events)
        fault = facts.fault or ("" if offer is None else mismatch(offer, facts))
        if fault:
            self._refuse(facts, FailureKind.INTERNAL, fault)
            if offer is not None:
                self._outputs.append(unread(offer, "the sequence was refused"))
            return False
        self._sequences[facts.request_id] = Tracked(facts.request_id, facts.epoch, self._now, offer)
        self._not_scheduled.add(facts.request_id)
        self._silent.add(facts.request_id)
        return True

    def _abandon(self, request_id: RequestId, epoch: Epoch, events: list[AnyEvent]) -> None:
        """Nobody wants this attempt any more: let the scheduler and the copier stop."""
        sequence = self._find(request_id, epoch)
        if sequence is not None:
            sequence.abandoned = "aborted"
        events.append(Cancelled(request_id=request_id, epoch=epoch))
        key = (request_id, epoch)
        if self._copies.withdraw(key):
            events.append(TransferEnded(request_id=request_id, epoch=epoch))
        elif self._copies.is_running(key):
            self._outputs.append(CancelCopy(request_id=request_id, epoch=epoch))

    def _on_copy_ended(self, result: CopyEnded, events: list[AnyEvent]) -> None:
        request_id, epoch = result.request_id, result.epoch
        if not self._copies.end((request_id, epoch)):
            raise InternalError(f"a copy for {request_id} (epoch {epoch}) ended but was not running")
        sequence = self._find(request_id, epoch)
        if sequence is not None:
            sequence.note_copy(result)
        is_sound = sequence is None or result.digests is None or sequence.is_sound()
        if result.failure or not is_sound:
            events.append(TransferFailed(request_id=request_id, epoch=epoch, ended=not result.may_still_write))
        else:
            events.append(TransferDone(request_id=request_id, epoch=epoch))

    def _on_leave(self, message: LeaveRouter, events: list[AnyEvent]) -> None:
        """Let go of all that a router wanted that is gone."""
        router = message.router
        for sequence in [one for one in self._sequences.values() if owner_of(one.request_id) == router]:
            self._abandon(sequence.request_id, sequence.epoch, events)
        events += self._scheduler.leases_of(router)

    def _on_peer_lost(self, message: PeerLost, events: list[AnyEvent]) -> None:
        self._outputs.append(ForgetPeer(incarnation=message.incarnation))
        for sequence in self._sequences.values():
            if not sequence.comes_from(message.incarnation):
                continue
            sequence.abandoned = "its source has died"
            if self._copies.withdraw((sequence.request_id, sequence.epoch)):
                events.append(TransferFailed(request_id=sequence.request_id, epoch=sequence.epoch))
        events.append(SourceLost(instance=message.instance))

    # Out: from the scheduler's actions to messages and effects ------------------------------------------------

    def _do_run_step(self, step: RunStep) -> None:
        if self._not_scheduled:
            self._note_first_steps(step)
        self._outputs.append(step)

    def _do_emit(self, action: Emit) -> None:
        firsts = self._first_outputs(action.request_ids, self._now) if self._silent else ()
        self._outputs.append(Emitted(request_ids=action.request_ids, firsts=firsts))

    def _do_offer(self, action: OfferKv) -> None:
        # From here on the sequence is another instance's.
        self._outputs.append(Offered(offer=kv_offer(action, self._header)))
        self._drop(action.request_id, action.epoch)
        self._forget(action.request_id, action.epoch)

    def _do_offer_part(self, action: OfferPart) -> None:
        offer = kv_offer(action, self._header, action.first_block, action.behind_step)
        self._outputs.append(PartOffered(offer=offer))

    def _do_lend(self, action: LendKv) -> None:
        if action.num_tokens:
            self._outputs.append(Offered(offer=kv_offer(action, self._header)))
        else:
            self._outputs.append(NotHeld(request_id=action.request_id, epoch=action.epoch))

    def _do_stop_pull(self, action: StopPull) -> None:
        self._outputs.append(CancelCopy(request_id=action.request_id, epoch=action.epoch))

    def _do_release(self, action: ReleaseLease) -> None:
        self._outputs.append(pulled(action, self._find(action.request_id, action.epoch), self._now))

    def _do_reject(self, action: Reject) -> None:
        self._fail(action.request_id, action.epoch, FailureKind.TOO_LONG, action.detail)

    def _do_forget(self, action: Forget) -> None:
        request_id, epoch = action.request_id, action.epoch
        if action.reason is FinishReason.ERROR:
            failed = self._find(request_id, epoch)
            if failed is not None and failed.failure is not None:
                self._tell_failure(request_id, epoch, failed.failure.kind, failed.failure.message)
        self._drop(request_id, epoch)
        self._outputs.append(action)

    def _do_effect(self, effect: WakeAt | LoadBlocks | SaveBlock | DropSaved) -> None:
        self._outputs.append(effect)

    def _note_first_steps(self, step: RunStep) -> None:
        for chunk in step.chunks:
            if chunk.request_id in self._not_scheduled:
                self._not_scheduled.remove(chunk.request_id)
                self._sequences[chunk.request_id].start_step(chunk.start, self._now)

    def _first_outputs(self, request_ids: Sequence[RequestId], now: float) -> tuple[FirstOutput, ...]:
        """Return what goes with those tokens, there ``now``, that are the first of their sequence here."""
        silent = self._silent
        firsts = [request_id for request_id in request_ids if request_id in silent]
        if not firsts:
            return ()
        silent.difference_update(firsts)
        return tuple([self._sequences[request_id].first_output(now) for request_id in firsts])

    def _tell_kv_events(self, events: tuple[AnyKvEvent, ...], owners: tuple[Owner | None, ...], place: int) -> None:
        """Put the news at this place among the outputs: before sequences that they are about are forgotten."""
        header, number = self._header, self._num_kv_events
        self._num_kv_events += 1
        message = KvEvents(instance=header.instance, incarnation=header.incarnation, number=number, events=events)
        self._outputs.insert(place, CacheChanged(message=message, owners=owners if header.tells_tokens else ()))

    def _do_pull(self, action: Pull) -> None:
        tracked = self._sequences[action.request_id]
        offer = tracked.offer if action.part is None else tracked.parts.get(action.part)
        if offer is None:
            raise InternalError(f"the scheduler pulls {action.request_id}, which nobody offered")
        self._copies.add(
            StartCopy(
                request_id=action.request_id,
                epoch=action.epoch,
                source=action.source,
                offer=offer,
                copies=pieces(offer, action.copies, self._header.block_size),
                expires_s=action.expires_s,
            )
        )

    def _refuse(self, facts: SequenceFacts, kind: FailureKind, why: str) -> None:
        self._tell_failure(facts.request_id, facts.epoch, kind, why)
        self._forget(facts.request_id, facts.epoch)

    def _fail(self, request_id: RequestId, epoch: Epoch, kind: FailureKind, why: str) -> None:
        self._tell_failure(request_id, epoch, kind, why)
        self._drop(request_id, epoch)
        self._forget(request_id, epoch)

    def _tell_failure(self, request_id: RequestId, epoch: Epoch, kind: FailureKind, why: str) -> None:
        self._outputs.append(Failed(request_id=request_id, epoch=epoch, kind=kind, message=why))

    def _forget(self, request_id: RequestId, epoch: Epoch) -> None:
        self._outputs.append(Forget(request_id=request_id, epoch=epoch, reason=FinishReason.ABORT))

    def _find(self, request_id: RequestId, epoch: Epoch) -> Tracked | None:
        sequence = self._sequences.get(request_id)
        return sequence if sequence is not None and sequence.epoch == epoch else None

    def _drop(self, request_id: RequestId, epoch: Epoch) -> None:
        """Close the record of an attempt, unless a newer one has taken its place."""
        if self._find(request_id, epoch) is not None:
            del self._sequences[request_id]
            self._not_scheduled.discard(request_id)
            self._silent.discard(request_id)


_TAKEN_BY: Final = by_type(AnyInstanceInput, InstanceCore, "_on_")
_CARRIED_OUT_BY: Final = by_type(AnyAction, InstanceCore, "_do_")
