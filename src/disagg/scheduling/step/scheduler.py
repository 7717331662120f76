"""The step scheduler of one instance, for every role: events and ``now`` in, actions out.

There are no phases: each sequence has known tokens and computed tokens, and a step is ``{sequence: number of tokens}``.
A prompt chunk, a decode, and a recomputation after preemption differ only in these numbers (vLLM v1's rule). The live
engine and the simulator drive this same class, the one with real time, the other with a heap.

Progress is guaranteed: a sequence that could never fit is rejected at arrival; a running sequence that needs a block
takes it from the latest one of lowest priority, which is computed again later; blocks leased to hand-overs come back
by release or by expiry. No sequence waits for one that is served after it.
"""

import bisect
import math
from collections.abc import Callable, Iterable

from disagg.base.config import SchedulerSettings, SchedulingMode
from disagg.base.errors import InternalError
from disagg.base.ids import Epoch, RequestId
from disagg.base.messages import InstanceLoad
from disagg.base.sampling import FinishReason
from disagg.cache.block_pool import BlockAudit
from disagg.scheduling.epoch_memory import EpochMemory
from disagg.scheduling.step.actions import (
    AnyAction,
    Chunk,
    Emit,
    Finish,
    OfferKv,
    Pull,
    Reject,
    RejectReason,
    ReleaseLease,
    RunStep,
    WakeAt,
)
from disagg.scheduling.step.builder import StepBuilder
from disagg.scheduling.step.events import (
    AnyEvent,
    Arrived,
    Cancelled,
    KvOffered,
    LeaseReleased,
    PeerLost,
    StepDone,
    Tick,
    TransferDone,
    TransferEnded,
    TransferFailed,
)
from disagg.scheduling.step.kv_ledger import KvLedger
from disagg.scheduling.step.sequence import RemoteKv, Sequence, SequenceState
from disagg.scheduling.step.statistics import SchedulerStatistics


def _order(sequence: Sequence) -> tuple[int, float, int]:
    return sequence.order


class StepScheduler:
    """Decides what one instance computes, pulls, offers and frees. Not thread-safe; deterministic."""

    def __init__(
        self, settings: SchedulerSettings, num_blocks: int, block_size: int, prefix_caching: bool = True
    ) -> None:
        self._settings = settings
        self._ledger = KvLedger(num_blocks, block_size, prefix_caching)
        self._sequences: dict[RequestId, Sequence] = {}
        # Each list is sorted by order and holds exactly the sequences of that state.
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._offered: list[Sequence] = []
        self._num_pulling = 0
        self._steps: dict[int, tuple[tuple[Sequence, Chunk], ...]] = {}
        self._now = -math.inf
        self._alarm = math.inf
        self._actions: list[AnyAction] = []
        self._statistics = SchedulerStatistics()
        self._ended = EpochMemory()
        self._fill: Callable[[StepBuilder], None] = {
            SchedulingMode.CHUNKED: self._fill_chunked,
            SchedulingMode.PREFILL_FIRST: self._fill_prefill_first,
            SchedulingMode.DECODE_FIRST: self._fill_decode_first,
        }[settings.scheduling]

    def handle(self, events: Iterable[AnyEvent], now: float) -> list[AnyAction]:
        """Apply events that happened up to ``now`` (seconds, never going back), then decide once.

        Returns the actions to carry out, in order. Events about unknown sequences or old epochs change nothing.
        """
        if now < self._now:
            raise InternalError(f"time went back from {self._now:.9f} to {now:.9f}")
        self._now = now
        self._actions = []
        for event in events:
            self._apply(event)
        if now >= self._alarm:
            self._expire()
        self._start_pulls()
        self._start_steps()
        return self._actions

    def load(self) -> InstanceLoad:
        """Return how busy the instance is."""
        num_waiting = len(self._waiting) + len(self._offered) + self._num_pulling
        return self._statistics.load(self._ledger, len(self._running), num_waiting)

    def audit(self) -> BlockAudit:
        """Count the blocks of each state."""
        return self._ledger.pool.audit()

    def validate(self) -> None:
        """Raise InternalError unless every list holds exactly the sequences of its state, and the blocks add up."""
        for queue, state in (
            (self._waiting, SequenceState.WAITING),
            (self._running, SequenceState.RUNNING),
            (self._offered, SequenceState.OFFERED),
        ):
            expected = {id(sequence) for sequence in self._sequences.values() if sequence.state is state}
            if {id(sequence) for sequence in queue} != expected or queue != sorted(queue, key=_order):
                raise InternalError(f"the {state.value} queue does not hold the {state.value} sequences in order")
        pulling = sum(sequence.state is SequenceState.PULLING for sequence in self._sequences.values())
        leased = sum(sequence.state is SequenceState.LEASED for sequence in self._sequences.values())
        if pulling != self._num_pulling or leased != len(self._ledger.leases):
            raise InternalError(f"{pulling} pulling and {leased} leased sequences contradict the books")
        self._ledger.pool.validate()

    # Events -------------------------------------------------------------------------------------------------

    def _apply(self, event: AnyEvent) -> None:
        match event:
            case StepDone():
                self._on_step_done(event)
            case Arrived():
                self._on_arrived(event)
            case KvOffered():
                self._on_kv_offered(event)
            case TransferDone(request_id=request_id, epoch=epoch):
                self._on_transfer_done(request_id, epoch)
            case TransferFailed(request_id=request_id, epoch=epoch, ended=ended):
                self._on_transfer_failed(request_id, epoch, ended)
            case TransferEnded(request_id=request_id, epoch=epoch):
                self._ledger.end_quarantine(request_id, epoch)
            case LeaseReleased(request_id=request_id, epoch=epoch):
                self._on_lease_released(request_id, epoch)
            case PeerLost(instance=instance):
                for sequence in [s for s in self._offered if s.remote is not None and s.remote.source == instance]:
                    self._compute_here(sequence)
            case Cancelled(request_id=request_id, epoch=epoch):
                self._on_cancelled(request_id, epoch)
            case Tick():
                pass  # handle() looks at the alarm after every batch of events

    def _on_arrived(self, event: Arrived) -> None:
        # A handed-over sequence never grows here: its next token is written by another instance.
        most_tokens = event.num_tokens if event.hand_over else event.max_total_tokens
        if not self._is_news(event) or not self._fits(event, most_tokens):
            return
        sequence = self._new_sequence(event, SequenceState.WAITING)
        sequence.hand_over = event.hand_over
        sequence.reuse_prefix = event.reuse_prefix
        sequence.num_prefill_tokens = event.num_tokens
        bisect.insort(self._waiting, sequence, key=_order)

    def _on_kv_offered(self, event: KvOffered) -> None:
        if not self._is_news(event):
            return
        if not self._fits(event, event.max_total_tokens):
            self._actions.append(ReleaseLease(request_id=event.request_id, epoch=event.epoch, source=event.source))
            return
        sequence = self._new_sequence(event, SequenceState.OFFERED)
        sequence.remote = RemoteKv(event.source, event.source_blocks, event.num_kv_tokens, event.expires_s)
        sequence.num_prefill_tokens = event.num_kv_tokens
        bisect.insort(self._offered, sequence, key=_order)
        if len(event.source_blocks) == self._ledger.num_blocks_for(event.num_kv_tokens):
            self._wake_at(event.expires_s)
        else:
            self._compute_here(sequence)

    def _on_step_done(self, event: StepDone) -> None:
        step = self._steps.pop(event.step_id, None)
        if step is None:
            raise InternalError(f"step {event.step_id} ended but was not running")
        results = iter(event.results)
        emitted: list[RequestId] = []
        ended: list[tuple[Sequence, FinishReason]] = []
        handed_over: list[Sequence] = []
        for sequence, chunk in step:
            sequence.num_in_flight = 0
            samples = chunk.samples and sequence.request_id not in event.failed
            result = next(results, None) if samples else None
            if samples and (result is None or result.request_id != sequence.request_id):
                raise InternalError(f"step {event.step_id} has no result for sequence {sequence.request_id}")
            if sequence.cancelled:
                self._ledger.free(sequence)
                self._end(sequence, FinishReason.ABORT)
                continue
            if sequence.request_id in event.failed:
                self._ledger.retract(sequence)
                ended.append((sequence, FinishReason.ERROR))
                continue
            self._statistics.count_tokens(sequence, chunk)
            sequence.num_computed += chunk.num_tokens
            self._ledger.publish(sequence)
            if result is not None:
                sequence.num_tokens += 1
                emitted.append(sequence.request_id)
                if result.finished is not None:
                    ended.append((sequence, result.finished))
                elif sequence.hand_over:
                    handed_over.append(sequence)
        if emitted:
            self._actions.append(Emit(request_ids=tuple(emitted)))
        for sequence, reason in ended:
            self._running.remove(sequence)
            self._ledger.free(sequence)
            self._end(sequence, reason)
        for sequence in handed_over:
            self._running.remove(sequence)
            self._offer(sequence)

    def _on_transfer_done(self, request_id: RequestId, epoch: Epoch) -> None:
        if self._ledger.end_quarantine(request_id, epoch):
            return
        sequence = self._find(request_id, epoch, SequenceState.PULLING)
        if sequence is None or sequence.remote is None:
            return
        if self._now >= sequence.remote.expires_s:
            # The source may have reused the blocks while they were read.
            self._on_transfer_failed(request_id, epoch, ended=True)
            return
        self._ledger.commit_pull(sequence)
        sequence.num_computed = sequence.remote.num_tokens
        self._ledger.publish(sequence)
        self._release_remote(sequence)
        self._num_pulling -= 1
        self._run(sequence)

    def _on_transfer_failed(self, request_id: RequestId, epoch: Epoch, ended: bool) -> None:
        sequence = self._find(request_id, epoch, SequenceState.PULLING)
        if sequence is not None:
            self._ledger.abandon_pull(sequence, ended)
            self._num_pulling -= 1
            self._compute_here(sequence)
        elif ended:
            self._ledger.end_quarantine(request_id, epoch)

    def _on_lease_released(self, request_id: RequestId, epoch: Epoch) -> None:
        sequence = self._find(request_id, epoch, SequenceState.LEASED)
        if sequence is not None and self._ledger.end_lease(request_id, epoch):
            self._forget(sequence)

    def _on_cancelled(self, request_id: RequestId, epoch: Epoch) -> None:
        sequence = self._sequences.get(request_id)
        if sequence is not None and sequence.epoch == epoch:
            self._cancel(sequence)

    def _cancel(self, sequence: Sequence) -> None:
        """Let go of a sequence in any state, as soon as nothing reads or writes its blocks."""
        match sequence.state:
            case SequenceState.WAITING:
                self._waiting.remove(sequence)
            case SequenceState.OFFERED:
                self._offered.remove(sequence)
                self._release_remote(sequence)
            case SequenceState.PULLING:
                self._num_pulling -= 1
                self._ledger.abandon_pull(sequence, ended=False)
                self._release_remote(sequence)
            case SequenceState.LEASED:
                self._ledger.end_lease(sequence.request_id, sequence.epoch)
                self._forget(sequence)
                return
            case SequenceState.RUNNING:
                self._running.remove(sequence)
                if sequence.num_in_flight:
                    sequence.cancelled = True
                    self._ended.remember(sequence.request_id, sequence.epoch)
                    del self._sequences[sequence.request_id]
                    return
                self._ledger.free(sequence)
            case SequenceState.ENDED:
                raise InternalError(f"sequence {sequence.request_id} ended but is still known")
        self._end(sequence, FinishReason.ABORT)

    def _expire(self) -> None:
        """End leases whose time is over, and compute here what was offered here until now."""
        for lease in self._ledger.end_expired_leases(self._now):
            self._statistics.num_leases_expired += 1
            self._forget(self._sequences[lease.request_id])
        for sequence in [s for s in self._offered if s.remote is not None and s.remote.expires_s <= self._now]:
            self._compute_here(sequence)
        self._alarm = math.inf
        next_lease = self._ledger.leases.next_expiry()
        if next_lease is not None:
            self._wake_at(next_lease)
        for sequence in self._offered:
            if sequence.remote is not None:
                self._wake_at(sequence.remote.expires_s)

    # Pulls and steps ----------------------------------------------------------------------------------------

    def _start_pulls(self) -> None:
        """Pull offered sequences, first come first served, while there are places in the batch and blocks."""
        while self._offered and self._has_room():
            sequence = self._offered[0]
            remote = sequence.remote
            served_before = bool(self._waiting) and self._waiting[0].order < sequence.order
            if served_before or remote is None or not self._ledger.begin_pull(sequence, remote, self._is_busy()):
                return
            del self._offered[0]
            sequence.move(SequenceState.PULLING, self._now)
            self._num_pulling += 1
            if sequence.copies:
                self._actions.append(
                    Pull(
                        request_id=sequence.request_id,
                        epoch=sequence.epoch,
                        source=remote.source,
                        copies=sequence.copies,
                        expires_s=remote.expires_s,
                    )
                )
            else:
                self._on_transfer_done(sequence.request_id, sequence.epoch)

    def _start_steps(self) -> None:
        if self._num_pulling and self._settings.pull_before_step:
            return
        while len(self._steps) < self._settings.max_steps_in_flight:
            builder = StepBuilder(self._settings.max_batch_tokens, self._settings.max_batch_size)
            self._fill(builder)
            step = builder.build()
            if not step:
                return
            self._statistics.num_steps += 1
            step_id = self._statistics.num_steps
            self._steps[step_id] = step
            self._actions.append(RunStep(step_id=step_id, chunks=tuple(chunk for _, chunk in step)))

    def _fill_chunked(self, builder: StepBuilder) -> None:
        self._plan_decodes(builder)
        for sequence in self._prefilling():
            self._plan(builder, sequence, builder.chunk_size(sequence))
        self._admit(builder, builder.chunk_size)

    def _fill_prefill_first(self, builder: StepBuilder) -> None:
        for sequence in self._prefilling():
            self._plan(builder, sequence, builder.whole_size(sequence))
        self._admit(builder, builder.whole_size)
        if not len(builder):
            self._plan_decodes(builder)

    def _fill_decode_first(self, builder: StepBuilder) -> None:
        self._plan_decodes(builder)
        if not self._running:
            self._admit(builder, builder.whole_size)

    def _plan_decodes(self, builder: StepBuilder) -> None:
        # With several steps in flight each takes its share, or one would hold all decodes and leave stages idle.
        share = -(-len(self._running) // self._settings.max_steps_in_flight)
        for sequence in [s for s in self._running if s.num_remaining == 1 and not s.num_in_flight][:share]:
            self._plan(builder, sequence, builder.chunk_size(sequence))

    def _prefilling(self) -> list[Sequence]:
        return [s for s in self._running if s.num_remaining > 1 and not s.num_in_flight]

    def _plan(self, builder: StepBuilder, sequence: Sequence, num_tokens: int) -> None:
        """Plan a running sequence's next tokens, preempting later ones when blocks are short."""
        if not num_tokens or sequence.state is not SequenceState.RUNNING:
            return
        while not self._ledger.grow(sequence, sequence.num_computed + num_tokens):
            victim = next((s for s in reversed(self._running) if not s.num_in_flight), sequence)
            if victim.order <= sequence.order:
                return  # leases and steps in flight hold the rest; their end will wake this sequence
            builder.drop(victim)
            self._preempt(victim)
        builder.add(sequence, num_tokens)

    def _admit(self, builder: StepBuilder, size: Callable[[Sequence], int]) -> None:
        """Let waiting sequences in, in order and without skipping, while places, tokens and blocks last."""
        while self._waiting and self._has_room() and builder.has_place:
            sequence = self._waiting[0]
            # A handed-over sequence does not grow, so it needs no headroom.
            if not size(sequence) or not self._ledger.admit(sequence, self._is_busy() and not sequence.hand_over):
                return
            del self._waiting[0]
            self._run(sequence)
            builder.add(sequence, size(sequence))

    def _preempt(self, sequence: Sequence) -> None:
        self._statistics.num_preemptions += 1
        self._running.remove(sequence)
        self._ledger.free(sequence)
        sequence.move(SequenceState.WAITING, self._now)
        bisect.insort(self._waiting, sequence, key=_order)

    def _has_room(self) -> bool:
        return len(self._running) + self._num_pulling < self._settings.max_batch_size

    def _is_busy(self) -> bool:
        return bool(self._running) or self._num_pulling > 0

    # Bookkeeping --------------------------------------------------------------------------------------------

    def _is_news(self, event: Arrived | KvOffered) -> bool:
        """False for a repeated, ended or old epoch; a newer epoch first replaces the older one."""
        known = self._sequences.get(event.request_id)
        if known is not None and known.epoch >= event.epoch:
            return False
        if self._ended.has_ended(event.request_id, event.epoch):
            return False
        if known is not None:
            self._cancel(known)
        return True

    def _fits(self, event: Arrived | KvOffered, most_tokens: int) -> bool:
        """Reject a sequence that could outgrow the whole pool."""
        if self._ledger.fits_at_all(most_tokens):
            return True
        detail = (
            f"{most_tokens} tokens need {self._ledger.num_blocks_for(most_tokens)} KV blocks, "
            f"but the instance has {self._ledger.pool.num_blocks}"
        )
        self._actions.append(
            Reject(request_id=event.request_id, epoch=event.epoch, reason=RejectReason.TOO_LONG, detail=detail)
        )
        return False

    def _new_sequence(self, event: Arrived | KvOffered, state: SequenceState) -> Sequence:
        self._statistics.num_arrivals += 1
        sequence = Sequence(
            request_id=event.request_id,
            epoch=event.epoch,
            num_tokens=event.num_tokens,
            max_total_tokens=event.max_total_tokens,
            order=(event.priority, event.arrival_s, self._statistics.num_arrivals),
            state=state,
            block_hashes=event.block_hashes,
        )
        sequence.story.append((self._now, state))
        self._sequences[event.request_id] = sequence
        return sequence

    def _find(self, request_id: RequestId, epoch: Epoch, state: SequenceState) -> Sequence | None:
        sequence = self._sequences.get(request_id)
        if sequence is None or sequence.epoch != epoch or sequence.state is not state:
            return None
        return sequence

    def _run(self, sequence: Sequence) -> None:
        sequence.move(SequenceState.RUNNING, self._now)
        bisect.insort(self._running, sequence, key=_order)

    def _compute_here(self, sequence: Sequence) -> None:
        """The remote KV blocks cannot be had: compute them here, so that the sequence is late but not lost."""
        if sequence.state is SequenceState.OFFERED:
            self._offered.remove(sequence)
        self._release_remote(sequence)
        sequence.move(SequenceState.WAITING, self._now)
        bisect.insort(self._waiting, sequence, key=_order)

    def _offer(self, sequence: Sequence) -> None:
        expires_s = self._now + self._settings.lease_s
        self._ledger.lease(sequence, expires_s)
        sequence.move(SequenceState.LEASED, self._now)
        self._actions.append(
            OfferKv(
                request_id=sequence.request_id,
                epoch=sequence.epoch,
                num_tokens=sequence.num_computed,
                block_ids=sequence.block_ids,
                expires_s=expires_s,
            )
        )
        self._wake_at(expires_s)

    def _release_remote(self, sequence: Sequence) -> None:
        if sequence.remote is not None:
            self._actions.append(
                ReleaseLease(request_id=sequence.request_id, epoch=sequence.epoch, source=sequence.remote.source)
            )
            sequence.remote = None

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        self._actions.append(Finish(request_id=sequence.request_id, epoch=sequence.epoch, reason=reason))
        self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        sequence.move(SequenceState.ENDED, self._now)
        self._ended.remember(sequence.request_id, sequence.epoch)
        if self._sequences.get(sequence.request_id) is sequence:
            del self._sequences[sequence.request_id]

    def _wake_at(self, time_s: float) -> None:
        if time_s < self._alarm:
            self._alarm = time_s
            self._actions.append(WakeAt(time_s=time_s))
