"""The step scheduler of one instance, for every role: events and ``now`` in, actions out.

There are no phases: each sequence has known tokens and computed tokens, and a step is ``{sequence: number of tokens}``.
A prompt chunk, a decode, and a recomputation after preemption differ only in these numbers (vLLM v1's rule). The live
engine and the simulator drive this same class, the one with real time, the other with a heap.

Progress is guaranteed: a sequence that could never fit is rejected at arrival; a running sequence that needs a block
takes it from the latest one of lowest priority, which is computed again later; blocks leased to hand-overs come back
by release or by expiry. No sequence waits for one that is served after it.
"""

from collections.abc import Iterable, Mapping
from typing import Final

from disagg.base.by_type import by_type
from disagg.base.config import SchedulerSettings, SchedulingMode
from disagg.base.errors import InternalError
from disagg.base.ids import BlockHash, Epoch, RequestId, RouterId
from disagg.base.kv_events import AnyKvEvent
from disagg.base.messages import InstanceLoad
from disagg.base.router_messages import ForeignLoad
from disagg.base.sampling import FinishReason
from disagg.cache.block_pool import BlockAudit
from disagg.cache.journal import KvJournal
from disagg.costs.latency import StepShape
from disagg.costs.step_times import StepTimes
from disagg.scheduling.by_objectives import scheduling_mode
from disagg.scheduling.capacity import most_tokens
from disagg.scheduling.hand_over.hand_overs import HandOvers
from disagg.scheduling.hand_over.tier_moves import TierMoves
from disagg.scheduling.step.actions import AnyAction, Chunk, Emit, RunStep
from disagg.scheduling.step.batching import Batching
from disagg.scheduling.step.block_audit import block_faults
from disagg.scheduling.step.books import Books
from disagg.scheduling.step.events import (
    AnyEvent,
    Arrived,
    BlockSaved,
    BlocksRead,
    Cancelled,
    KvExtended,
    KvOffered,
    KvWanted,
    LeaseReleased,
    MigrationAsked,
    SourceLost,
    StepDone,
    Tick,
    TransferDone,
    TransferEnded,
    TransferFailed,
)
from disagg.scheduling.step.foreign_load import foreign_load, leases_of
from disagg.scheduling.step.kv_ledger import KvMemory
from disagg.scheduling.step.planned_step import PlannedStep, StepForecast
from disagg.scheduling.step.sequence import Sequence, SequenceState
from disagg.scheduling.step.standing_step import StandingStep, decode_chunk
from disagg.scheduling.step.statistics import Occupancy
from disagg.scheduling.step.threads import ONE_THREAD, StepThreads

_OF_OTHERS: Final = frozenset({KvOffered, KvExtended, TransferDone, TransferFailed, TransferEnded, LeaseReleased, Tick})
"""Events about sequences that are in no step."""
_STANDING: Final = PlannedStep((), ())
"""Stands for a standing step, which knows its sequences itself."""


class StepScheduler:
    """Decides what one instance computes, pulls, offers and frees. Not thread-safe; deterministic.

    ``max_model_len`` bounds sequences beside what the pool holds. ``num_stages`` are those of the executor's pipeline;
    ``times`` predicts steps; ``memory`` says where KV blocks are, and ``threads`` which cores there are.
    """

    def __init__(
        self,
        settings: SchedulerSettings,
        num_blocks: int,
        block_size: int,
        prefix_caching: bool = True,
        *,
        max_model_len: int | None = None,
        num_stages: int = 1,
        times: StepTimes | None = None,
        memory: KvMemory | None = None,
        threads: StepThreads = ONE_THREAD,
    ) -> None:
        self._books = Books(settings, num_blocks, block_size, prefix_caching, max_model_len, memory)
        # Predicting costs more than most decisions: it is done where somebody asked for it. With tiers it is prefill
        # that is weighed against reading, and only steps with prefill are learned from.
        self._times_all = times is not None or scheduling_mode(settings) is SchedulingMode.SLACK or settings.tells_costs
        self._threads = threads
        self._times = times or (StepTimes() if self._times_all or self._books.ledger.tiers else None)
        self._hand_over = HandOvers(self._books, self._times)
        self._batching = Batching(self._books, num_stages, self._times, self._hand_over.early.make_room)
        self._tiers = TierMoves(self._books)
        self._pool = self._books.ledger.pool
        self._block_size = block_size
        self._steps: dict[int, PlannedStep] = {}
        self._standing: StandingStep | None = None
        """The step in flight, or that has just ended, once it was repeated."""

    def handle(self, events: Iterable[AnyEvent], now: float) -> list[AnyAction]:
        """Apply events that happened up to ``now`` (seconds, never going back), then decide once.

        Returns the actions to carry out, in order. Events about unknown sequences or old epochs change nothing.
        """
        books = self._books
        if now < books.now:
            raise InternalError(f"time went back from {books.now:.9f} to {now:.9f}")
        books.now = now
        books.actions = []
        for event in events:
            if self._standing is not None and not _leaves_standing(event):
                self._stand_down(self._standing)
            _TAKEN_BY[type(event)](self, event)
        if now >= books.alarm:
            self._hand_over.expire()
        self._hand_over.start_pulls()
        if not (books.settings.pull_before_step and books.num_pulling > self._hand_over.early.num_patient):
            self._start_steps()
        if self._standing is not None and not self._steps:
            self._stand_down(self._standing)
        if books.ledger.tiers:
            self._tiers.start_saves()
        return books.actions

    @property
    def capacity(self) -> int:
        """Longest sequence that is taken, in tokens."""
        return self._books.capacity

    @property
    def times(self) -> StepTimes | None:
        """What predicts steps and learns from them; None where nobody asked for it."""
        return self._times

    @property
    def num_held_blocks(self) -> int:
        """Blocks that are neither free nor merely cached."""
        return self._pool.num_held

    @property
    def journal(self) -> KvJournal:
        """What became of the cached blocks, for the router."""
        return self._books.ledger.journal

    def all_cached(self) -> tuple[AnyKvEvent, ...]:
        """Return events that say all that is cached now; those before need not be told any more."""
        return self._books.ledger.all_cached()

    def is_news(self, request_id: RequestId, epoch: Epoch) -> bool:
        """Return False for an attempt that will be ignored: a repeated, ended or old one."""
        return self._books.is_news(request_id, epoch)

    def load(self) -> InstanceLoad:
        """Return how busy the instance is."""
        return self._books.statistics.load(self._books.ledger, self._times, self.occupancy)

    @property
    def occupancy(self) -> Occupancy:
        """How many sequences are here."""
        books, ledger = self._books, self._books.ledger
        num_waiting = len(books.waiting) + self._hand_over.num_waiting
        return Occupancy(len(books.running), num_waiting, len(ledger.leases) + len(ledger.loans))

    def load_of_others(self, router: RouterId) -> ForeignLoad:
        """Return what of the load is not this router's."""
        return foreign_load(self._books.sequences.values(), self._books.ledger.loans, router)

    def leases_of(self, router: RouterId) -> list[LeaseReleased]:
        """Return what ends every lease and loan for this router's sequences."""
        ledger = self._books.ledger
        leases = leases_of((*ledger.loans, *ledger.leases), router)
        return [LeaseReleased(request_id=lease.request_id, epoch=lease.epoch) for lease in leases]

    def audit(self) -> BlockAudit:
        """Count the blocks of each state."""
        return self._books.ledger.pool.audit()

    def block_faults(self) -> tuple[str, ...]:
        """See ``block_audit``."""
        discarded = {
            id(sequence): sequence
            for step in self._steps.values()
            for sequence, _ in step.parts
            if sequence.discarded is not None
        }
        # A leased sequence's hold has become a lease.
        live = [one for one in self._books.sequences.values() if one.state is not SequenceState.LEASED]
        return block_faults(self._books.ledger, (*live, *discarded.values()))

    def validate(self) -> None:
        """Raise InternalError unless every list holds exactly the sequences of its state, and the blocks add up."""
        books = self._books
        books.validate_queue(books.waiting, SequenceState.WAITING)
        books.validate_queue(books.running, SequenceState.RUNNING)
        self._hand_over.validate()
        if faults := self.block_faults():
            raise InternalError("; ".join(faults))

    # Events -------------------------------------------------------------------------------------------------

    def _on_cancelled(self, event: Cancelled) -> None:
        sequence = self._books.sequences.get(event.request_id)
        if sequence is not None and sequence.epoch == event.epoch:
            self._cancel(sequence)

    def _on_tick(self, event: Tick) -> None:
        """Do nothing: ``handle`` looks at the alarm after every batch of events."""

    def _on_saved(self, event: BlockSaved) -> None:
        self._tiers.on_saved(event)

    def _on_read(self, event: BlocksRead) -> None:
        self._hand_over.reads.ended(event.reads)
        self._tiers.on_read(event.reads)

    def _on_extended(self, event: KvExtended) -> None:
        self._hand_over.early.on_extended(event)

    def _on_transfer_done(self, event: TransferDone) -> None:
        self._hand_over.on_transfer_done(event.request_id, event.epoch)

    def _on_transfer_failed(self, event: TransferFailed) -> None:
        self._hand_over.on_transfer_failed(event.request_id, event.epoch, event.ended)

    def _on_transfer_ended(self, event: TransferEnded) -> None:
        self._hand_over.on_transfer_ended(event.request_id, event.epoch)

    def _on_wanted(self, event: KvWanted) -> None:
        self._hand_over.on_kv_wanted(event)

    def _on_released(self, event: LeaseReleased) -> None:
        self._hand_over.on_lease_released(event.request_id, event.epoch)

    def _on_source_lost(self, event: SourceLost) -> None:
        self._hand_over.on_source_lost(event.instance)

    def _on_arrived(self, event: Arrived) -> None:
        if self._replaces(event):
            self._enter(event)

    def _on_kv_offered(self, event: KvOffered) -> None:
        if not self._hand_over.early.completes(event) and self._replaces(event):
            self._hand_over.on_kv_offered(event)

    def _replaces(self, event: Arrived | KvOffered) -> bool:
        """Return whether a sequence is no old news; a newer attempt takes the place of an older one."""
        if not self._books.is_news(event.request_id, event.epoch):
            return False
        known = self._books.sequences.get(event.request_id)
        if known is not None:
            if self._standing is not None:
                self._stand_down(self._standing)  # it may be one of its sequences
            self._cancel(known)
        return True

    def _enter(self, event: Arrived) -> None:
        needed = most_tokens(event.num_tokens, event.max_total_tokens, hand_over=event.hand_over)
        if self._books.rejects(event, needed):
            if event.prefix is not None:
                self._hand_over.refuse(event.request_id, event.epoch, event.prefix.source)
            return
        sequence = self._books.enter(event, SequenceState.WAITING if event.prefix is None else SequenceState.OFFERED)
        sequence.hand_over = event.hand_over
        sequence.reuse_prefix = event.reuse_prefix
        sequence.num_prefill_tokens = event.num_tokens
        if event.prefix is not None:
            self._hand_over.borrow(sequence, event.prefix)
        elif not self._hand_over.read_tiers(sequence):
            self._books.wait(sequence)

    def _on_migration_asked(self, event: MigrationAsked) -> None:
        """Let go of a sequence after its next token, wherever that token's turn is; one that is gone stays gone."""
        sequence = self._books.sequences.get(event.request_id)
        if sequence is not None and sequence.epoch == event.epoch:
            sequence.hand_over = True

    def _take_step(self, event: StepDone) -> PlannedStep:
        """Return what was planned of a step that has ended, and learn from what it took."""
        planned = self._steps.pop(event.step_id, None)
        if planned is None:
            raise InternalError(f"step {event.step_id} ended but was not running")
        self._books.statistics.borrowed_s += event.borrowed_s
        if self._times is not None and planned.forecast is not None:
            forecast = planned.forecast
            alone_s = self._threads.alone_s(forecast.shape, event.duration_s, event.borrowed_s)
            self._times.note(forecast.shape, forecast.predicted_s, alone_s)
        return planned

    def _on_step_done(self, event: StepDone) -> None:
        if self._standing is not None:
            self._end_standing(event, self._standing)
            return
        books = self._books
        planned = self._take_step(event)
        failed = {failure.request_id for failure in event.failed} if event.failed else ()
        results = {result.request_id: result for result in event.results}
        emitted: list[RequestId] = []
        ended: list[tuple[Sequence, FinishReason]] = []
        handed_over: list[Sequence] = []
        for sequence, chunk in planned.parts:
            request_id = sequence.request_id
            result = results.pop(request_id, None) if results else None
            sequence.num_in_flight -= chunk.num_tokens
            sequence.num_coming -= chunk.samples
            if sequence.discarded is not None:
                self._let_go(sequence)
                continue
            if failed and request_id in failed:
                books.ledger.retract(sequence)
                ended.append((sequence, FinishReason.ERROR))
                continue
            self._note_computed(sequence, chunk)
            if not chunk.samples:
                continue
            sequence.add_token(books.now, () if result is None else result.block_hashes)
            emitted.append(request_id)
            if result is not None and result.finished is not None:
                ended.append((sequence, result.finished))
            elif sequence.hand_over and not sequence.num_in_flight:  # it may have been told while a step more was
                handed_over.append(sequence)
        if results:
            raise InternalError(f"step {event.step_id} has results for {', '.join(results)}, which took no part")
        if emitted:
            books.actions.append(Emit(request_ids=tuple(emitted)))
        for sequence, reason in ended:
            self._end_running(sequence, reason)
        for sequence in handed_over:
            books.running.remove(sequence)
            self._tiers.sequence_leaves(sequence)
            self._hand_over.offer(sequence)

    def _note_computed(self, sequence: Sequence, chunk: Chunk) -> None:
        """Take account of tokens whose KV is there now."""
        self._books.statistics.count_tokens(sequence, chunk)
        sequence.num_computed += chunk.num_tokens
        if sequence.block_hashes and sequence.num_computed // self._block_size > sequence.num_published:
            self._books.ledger.publish(sequence)
        if sequence.hand_over and not chunk.samples:
            self._hand_over.offer_part(sequence)

    def _cancel(self, sequence: Sequence) -> None:
        """Let go of a sequence in any state, as soon as nothing reads or writes its blocks."""
        match sequence.state:
            case SequenceState.WAITING:
                self._books.waiting.remove(sequence)
            case SequenceState.OFFERED | SequenceState.PULLING | SequenceState.AWAITING:
                self._hand_over.cancel(sequence)
            case SequenceState.LEASED:
                self._hand_over.end_lease(sequence)
                return
            case SequenceState.RUNNING:
                self._end_running(sequence, FinishReason.ABORT)
                return
            case SequenceState.ENDED:
                raise InternalError(f"sequence {sequence.request_id} ended but is still known")
        self._books.end(sequence, FinishReason.ABORT)

    def _end_running(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a running sequence: now, or when the last step in flight no longer writes to its blocks."""
        self._books.running.remove(sequence)
        sequence.discarded = reason
        self._books.drop(sequence)
        self._let_go(sequence)

    def _let_go(self, sequence: Sequence) -> None:
        if not sequence.num_in_flight and sequence.discarded is not None:
            if sequence.discarded is not FinishReason.ERROR:
                self._tiers.sequence_leaves(sequence)
            self._books.ledger.free(sequence)
            self._books.end(sequence, sequence.discarded)

    def _start_steps(self) -> None:
        books = self._books
        while len(self._steps) < books.settings.max_steps_in_flight:
            if self._standing is not None:
                if self._run_on(self._standing):
                    return
                self._stand_down(self._standing)
            if not books.running and not books.waiting:
                return
            start_s = books.now
            for step in self._steps.values():
                # An idle instance starts at once, a busy one when what is in flight is expected to end.
                start_s = start_s if step.forecast is None else max(start_s, step.forecast.end_s)
            parts = self._batching.plan(start_s)
            if not parts:
                return
            books.statistics.num_steps += 1
            step_id = books.statistics.num_steps
            chunks = tuple([chunk for _, chunk in parts])
            planned = PlannedStep(parts, chunks)
            if self._times is not None and (self._times_all or any(chunk.num_tokens > 1 for chunk in chunks)):
                shape = StepShape.of(chunks)
                predicted_s = self._times.predict_s(shape)
                planned.forecast = StepForecast(shape, predicted_s, start_s + predicted_s)
            self._steps[step_id] = planned
            num_borrowed = self._threads.num_borrowed(chunks)
            books.actions.append(RunStep(step_id=step_id, chunks=chunks, num_borrowed=num_borrowed))
            if books.ledger.shows_progress:
                self._hand_over.offer_behind(step_id, parts)

    # Equal steps in one go ------------------------------------------------------------------------------------

    def num_repeats(self) -> int:
        """Return how often at least the step in flight would come again if nothing happened but its end; 0 if never.

        That holds when the step is the only one and decodes every running sequence, and while blocks last, so that
        none is preempted. What waits then goes on waiting: it was left out of this step for want of a place or of
        blocks, and neither becomes more by decoding. 0 as well where each step is learned from.
        """
        books = self._books
        if len(self._steps) != 1 or books.settings.max_steps_in_flight != 1:
            return 0
        if self._times_all:
            return 0
        if self._standing is None:
            step = next(iter(self._steps.values())).parts
            if len(step) != len(books.running):
                return 0
            for sequence, chunk in step:
                if chunk.num_tokens != 1 or sequence.hand_over or sequence.discarded is not None:
                    return 0
            if books.ledger.has_windows:
                return min(books.ledger.num_tokens_until_change(sequence) for sequence, _ in step)
        # Each sequence takes a block for every block_size tokens, and one more at most.
        num_blocks_each = books.ledger.pool.num_available // len(books.running)
        return max(0, num_blocks_each - 1) * books.ledger.block_size

    def repeat(
        self, count: int, names: Mapping[RequestId, tuple[BlockHash, ...]], *, is_over: bool = False
    ) -> tuple[RunStep, list[RequestId]]:
        """Do what ``count`` ends of the step in flight, none of which ends a sequence, would have done.

        Between two changes of a decode batch every call would do the same: book one token for each sequence, take a
        block here and there, and order the same step again. So a simulation costs by changes, not by tokens. ``names``
        are those of the blocks that the new tokens fill. Returns the step in flight, which is now the last repetition,
        without chunks, and who got a first token in the first of these. When it ``is_over``, the last of these ends has
        started no other: that is for the next call of ``handle`` to decide.
        """
        books = self._books
        ((step_id, planned),) = self._steps.items()
        standing = self._standing
        if standing is None:
            standing = self._standing = StandingStep(books.ledger, [sequence for sequence, _ in planned.parts])
        fresh = standing.end(count, is_over=is_over)
        for request_id, its in names.items():
            standing.add_names(books.sequences[request_id], its)
        for sequence in standing.named:
            books.ledger.publish(sequence)
        books.statistics.num_steps += count - is_over
        books.statistics.num_decode_tokens += count * len(standing)
        last_id = step_id + count - is_over
        self._steps = {} if is_over else {last_id: _STANDING}
        step = RunStep(step_id=last_id, chunks=(), num_standing=len(standing))
        return step, [sequence.request_id for sequence in fresh]

    def _end_standing(self, event: StepDone, standing: StandingStep) -> None:
        """Book the end of a standing step. Those that it neither begins nor ends are not named among the emitted."""
        books = self._books
        self._take_step(event)
        books.statistics.num_decode_tokens += len(standing)
        told, ended = standing.finish(event.results, books.sequences)
        if told:
            books.actions.append(Emit(request_ids=tuple([sequence.request_id for sequence in told])))
        for sequence, reason in ended:
            self._end_running(sequence, reason)

    def _run_on(self, standing: StandingStep) -> bool:
        """Start a standing step again, with those that run by now beside it; return False where that cannot be."""
        books, num_standing = self._books, len(standing)
        newcomers = None if books.waiting or self._threads.num_borrowable else standing.begin(books)
        if newcomers is None:
            return False
        books.statistics.num_steps += 1
        step_id, chunks = books.statistics.num_steps, tuple([decode_chunk(one) for one in newcomers])
        self._steps[step_id] = _STANDING
        books.actions.append(RunStep(step_id=step_id, chunks=chunks, num_standing=num_standing))
        return True

    def _stand_down(self, standing: StandingStep) -> None:
        """Go on with a standing step as with any other."""
        self._standing, parts = None, standing.settle()
        for step_id in self._steps:
            self._steps[step_id] = PlannedStep(parts, tuple([chunk for _, chunk in parts]))


def _leaves_standing(event: AnyEvent) -> bool:
    """Return True for what is about no sequence of a standing step, or only says that the step has ended."""
    return type(event) in _OF_OTHERS or (isinstance(event, StepDone) and not event.failed)


_TAKEN_BY: Final = by_type(AnyEvent, StepScheduler, "_on_")
