"""The hand-over of one instance, both sides: blocks leased to others, and blocks pulled from others.

A pull starts when there is room for the sequence (blocks and a place in the batch), so that the source's pool is the
buffer and this instance is never flooded. What cannot be pulled is computed here: late, but not lost.
"""

import bisect
import math
from collections.abc import Iterable
from typing import Final

from disagg.base.errors import InternalError
from disagg.base.ids import Epoch, InstanceId, RequestId
from disagg.costs.step_times import StepTimes
from disagg.scheduling.capacity import most_tokens
from disagg.scheduling.hand_over.early_pulls import EarlyPulls
from disagg.scheduling.hand_over.tier_reads import TierReads
from disagg.scheduling.step.actions import Chunk, LendKv, LoadBlocks, OfferKv, OfferPart, Pull, ReleaseLease
from disagg.scheduling.step.books import Books, order_of
from disagg.scheduling.step.events import KvOffered, KvWanted, LentKv
from disagg.scheduling.step.sequence import RemoteKv, Sequence, SequenceState

LEAST_PART_TOKENS: Final = 128
"""A part costs three messages, and a pull has a latency: fewer tokens wait for more. Parts end at multiples of it, so
that they are of whole blocks too where whoever reads them has larger ones."""
LEASE_GRACE_S: Final = 1.0
"""Blocks are kept for longer than was promised: the promise is a duration, and its message takes time to arrive."""


class HandOvers:
    """Offers and leases of this instance's blocks; adoption and pulls of other instances' blocks."""

    def __init__(self, books: Books, times: StepTimes | None = None) -> None:
        self._books = books
        self._offered: list[Sequence] = []
        self.reads = TierReads(books, times)
        self.early = EarlyPulls(books, self._offered, self._compute_here, self.on_transfer_done)

    @property
    def num_waiting(self) -> int:
        """Adopted sequences whose blocks are not here yet."""
        return len(self._offered) + len(self.early.without_room) + self._books.num_pulling

    # This instance's blocks -----------------------------------------------------------------------------------

    def offer(self, sequence: Sequence) -> None:
        """Lease the blocks of a sequence that was running to whoever continues it."""
        books = self._books
        lease_s = books.settings.lease_s
        expires_s = books.now + lease_s + LEASE_GRACE_S
        books.ledger.lease(sequence, expires_s)
        sequence.move(SequenceState.LEASED, books.now)
        books.actions.append(
            OfferKv(
                request_id=sequence.request_id,
                epoch=sequence.epoch,
                num_tokens=sequence.num_computed,
                block_ids=sequence.held,
                lease_s=lease_s,
            )
        )
        books.wake_at(expires_s)

    def offer_part(self, sequence: Sequence) -> None:
        """Let another instance read the blocks of a prompt that are final while the rest of it is computed.

        They are not leased: whoever computes holds them until the whole is offered, or nobody wants it any more.
        """
        books, first = self._books, sequence.num_offered
        size = books.ledger.block_size
        num_full = sequence.num_computed // LEAST_PART_TOKENS * LEAST_PART_TOKENS // size
        is_last = sequence.num_computed >= sequence.num_tokens
        if is_last or not books.settings.kv_overlap or (num_full - first) * size < LEAST_PART_TOKENS:
            return
        self._offer_up_to(sequence, num_full, num_full * size)

    def offer_behind(self, step_id: int, parts: Iterable[tuple[Sequence, Chunk]]) -> None:
        """Let another instance read the last blocks of prompts behind the step that has just begun to write them."""
        ledger = self._books.ledger
        if not self._books.settings.kv_overlap:
            return
        for sequence, chunk in parts:
            is_prompt = sequence.num_tokens == sequence.num_prefill_tokens
            if not (sequence.hand_over and chunk.samples and is_prompt):
                continue
            num_all = ledger.num_blocks_for(sequence.num_tokens)
            if (num_all - sequence.num_offered) * ledger.block_size >= LEAST_PART_TOKENS:
                self._offer_up_to(sequence, num_all, sequence.num_tokens, step_id)

    def _offer_up_to(self, sequence: Sequence, end: int, num_tokens: int, behind_step: int = 0) -> None:
        books, first = self._books, sequence.num_offered
        sequence.num_offered = end
        books.actions.append(
            OfferPart(
                request_id=sequence.request_id,
                epoch=sequence.epoch,
                first_block=first,
                num_tokens=num_tokens,
                block_ids=books.ledger.part_of(sequence, first, end),
                lease_s=books.settings.lease_s,
                behind_step=behind_step,
            )
        )

    def on_kv_wanted(self, event: KvWanted) -> None:
        """Lend what is cached of another instance's sequence."""
        books = self._books
        lease_s = books.settings.lease_s
        expires_s = books.now + lease_s + LEASE_GRACE_S
        num_tokens, blocks = books.ledger.lend(event.request_id, event.epoch, event.block_hashes, expires_s)
        if blocks:
            books.wake_at(expires_s)
        books.actions.append(
            LendKv(
                request_id=event.request_id,
                epoch=event.epoch,
                num_tokens=num_tokens,
                block_ids=blocks,
                lease_s=lease_s,
            )
        )

    def on_lease_released(self, request_id: RequestId, epoch: Epoch) -> None:
        """The blocks were read, or never will be."""
        if self._books.ledger.end_loan(request_id, epoch):
            return
        sequence = self._books.find(request_id, epoch, SequenceState.LEASED)
        if sequence is not None:
            self.end_lease(sequence)

    def end_lease(self, sequence: Sequence) -> None:
        """Take the blocks of a leased sequence back."""
        if self._books.ledger.end_lease(sequence.request_id, sequence.epoch):
            self._books.forget(sequence)

    # Other instances' blocks ----------------------------------------------------------------------------------

    def on_kv_offered(self, event: KvOffered) -> None:
        """Adopt a sequence whose blocks are elsewhere."""
        books = self._books
        if books.rejects(event, most_tokens(event.num_tokens, event.max_total_tokens, hand_over=False)):
            self.refuse(event.request_id, event.epoch, event.source)
            return
        if not event.is_whole:
            self.early.enter(event)
            return
        sequence = books.enter(event, SequenceState.OFFERED)
        sequence.remote = RemoteKv(event.source, event.source_blocks, event.num_kv_tokens, event.expires_s)
        sequence.num_prefill_tokens = event.num_kv_tokens
        sequence.go_on(event.answer_age_s, event.num_later_tokens, books.now)
        bisect.insort(self._offered, sequence, key=order_of)
        if books.ledger.is_whole(event.num_kv_tokens, event.source_blocks):
            books.wake_at(event.expires_s)
        else:
            self._compute_here(sequence)

    def refuse(self, request_id: RequestId, epoch: Epoch, source: InstanceId) -> None:
        """Tell a source that its blocks will not be read: their sequence was not taken."""
        self._books.actions.append(ReleaseLease(request_id=request_id, epoch=epoch, source=source))

    def borrow(self, sequence: Sequence, prefix: LentKv) -> None:
        """Let a sequence whose first blocks another instance lends wait for them, unless they are of no use."""
        remote = RemoteKv(prefix.source, prefix.source_blocks, prefix.num_tokens, prefix.expires_s, is_prefix=True)
        sequence.remote = remote
        bisect.insort(self._offered, sequence, key=order_of)
        ledger = self._books.ledger
        is_whole = (
            ledger.is_whole(prefix.num_tokens, prefix.source_blocks) and not prefix.num_tokens % ledger.block_size
        )
        if sequence.reuse_prefix and is_whole and prefix.num_tokens < sequence.num_tokens:
            self._books.wake_at(prefix.expires_s)
        else:
            self._compute_here(sequence)

    def read_tiers(self, sequence: Sequence) -> bool:
        """Let a sequence that has just arrived wait for the blocks that it is to read; False: there are none."""
        self.reads.choose(sequence, self._offered)
        if sequence.to_read:
            sequence.move(SequenceState.OFFERED, self._books.now)
            bisect.insort(self._offered, sequence, key=order_of)
        return bool(sequence.to_read)

    def start_pulls(self) -> None:
        """Pull offered sequences, first come first served, while there are places in the batch and blocks."""
        books = self._books
        while self._offered and (books.has_room or self.early.make_room()):
            sequence = self._offered[0]
            is_ahead = bool(books.waiting) and books.waiting[0].order < sequence.order
            if is_ahead and not self.reads.may_read_ahead(sequence):
                break  # whoever waits is served before
            if not self._begin(sequence, sequence.remote):
                if self.early.make_room():
                    continue
                break
            del self._offered[0]
            sequence.move(SequenceState.PULLING, books.now)
            books.num_pulling += 1
            if sequence.loads:
                self.reads.started(sequence.loads)
                books.actions.append(
                    LoadBlocks(request_id=sequence.request_id, epoch=sequence.epoch, blocks=sequence.loads)
                )
            elif sequence.remote is not None and sequence.copies:
                books.actions.append(
                    Pull(
                        request_id=sequence.request_id,
                        epoch=sequence.epoch,
                        source=sequence.remote.source,
                        copies=sequence.copies,
                        expires_s=sequence.remote.expires_s,
                    )
                )
            else:
                self.on_transfer_done(sequence.request_id, sequence.epoch)
        self.early.start()

    def _begin(self, sequence: Sequence, remote: RemoteKv | None) -> bool:
        ledger, is_busy = self._books.ledger, self._books.is_busy
        if ledger.is_quarantined(sequence.request_id, sequence.epoch):
            return False  # what was read of it early has failed, and may still write
        return ledger.begin_load(sequence, is_busy) if remote is None else ledger.begin_pull(sequence, remote, is_busy)

    def on_transfer_done(self, request_id: RequestId, epoch: Epoch) -> None:
        """The blocks have arrived: the sequence runs."""
        books = self._books
        if books.ledger.end_quarantine(request_id, epoch):
            return
        sequence = books.find(request_id, epoch, SequenceState.PULLING)
        if sequence is None:
            return
        being_read = sequence.remote if sequence.early is None else sequence.early.reading or sequence.remote
        if being_read is not None and books.now >= being_read.expires_s:
            # The source may have reused the blocks while they were read.
            self.on_transfer_failed(request_id, epoch, ended=True)
            return
        if sequence.early is not None and not self.early.arrived(sequence):
            return
        books.ledger.commit_pull(sequence)
        books.ledger.publish(sequence)
        self._release_remote(sequence)
        books.num_pulling -= 1
        books.run(sequence)

    def on_transfer_failed(self, request_id: RequestId, epoch: Epoch, ended: bool) -> None:
        """The blocks will not all arrive; unless ``ended``, some still may."""
        books = self._books
        sequence = books.find(request_id, epoch, SequenceState.PULLING)
        if sequence is not None and ended and self.early.is_behind(sequence):
            self.early.missed(sequence)
        elif sequence is not None and sequence.early is not None and sequence.remote is None:
            self.early.give_up(sequence, ended=ended)
        elif sequence is not None:
            self.early.let_go(sequence, ended=ended)
            sequence.early = None
            self._compute_here(sequence)
        elif ended:
            books.ledger.end_quarantine(request_id, epoch)

    def on_transfer_ended(self, request_id: RequestId, epoch: Epoch) -> None:
        """A failed or cancelled pull writes no more."""
        self._books.ledger.end_quarantine(request_id, epoch)

    def on_source_lost(self, source: InstanceId) -> None:
        """An instance died: what it offered, and nobody began to pull, is computed here."""
        self.early.on_source_lost(source)
        for sequence in [s for s in self._offered if s.remote is not None and s.remote.source == source]:
            self._compute_here(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Let go of an offered or pulling sequence, or one that is waited for; its record stays open."""
        if sequence.state is SequenceState.OFFERED:
            (self._offered if sequence.early is None else self.early.without_room).remove(sequence)
        else:
            self.early.let_go(sequence, ended=sequence.state is SequenceState.AWAITING)
        self._release_remote(sequence)

    def expire(self) -> None:
        """End leases whose time is over, and compute here what was offered here until now."""
        books = self._books
        for lease in books.ledger.end_expired_leases(books.now):
            books.statistics.num_leases_expired += 1
            books.forget(books.sequences[lease.request_id])
        for sequence in [s for s in self._offered if s.remote is not None and s.remote.expires_s <= books.now]:
            self._compute_here(sequence)
        books.alarm = math.inf
        next_lease_s = books.ledger.next_expiry()
        if next_lease_s < math.inf:
            books.wake_at(next_lease_s)
        for sequence in self._offered:
            if sequence.remote is not None:
                books.wake_at(sequence.remote.expires_s)

    def validate(self) -> None:
        """Raise InternalError unless offers, pulls and leases are those that the sequences' states say."""
        books = self._books
        offered = sorted([*self._offered, *self.early.without_room], key=order_of)
        books.validate_queue(offered, SequenceState.OFFERED)
        books.validate_queue(self.early.awaiting, SequenceState.AWAITING)
        has_blocks = (SequenceState.PULLING, SequenceState.AWAITING)
        pulling = sum(sequence.state in has_blocks for sequence in books.sequences.values())
        leased = sum(sequence.state is SequenceState.LEASED for sequence in books.sequences.values())
        if pulling != books.num_pulling or leased != len(books.ledger.leases):
            raise InternalError(f"{pulling} pulling and {leased} leased sequences contradict the books")

    def _compute_here(self, sequence: Sequence) -> None:
        if sequence.state is SequenceState.OFFERED:
            self._offered.remove(sequence)
        self._release_remote(sequence)
        sequence.move(SequenceState.WAITING, self._books.now)
        self._books.wait(sequence)

    def _release_remote(self, sequence: Sequence) -> None:
        if sequence.remote is not None:
            self._books.actions.append(
                ReleaseLease(request_id=sequence.request_id, epoch=sequence.epoch, source=sequence.remote.source)
            )
            sequence.remote = None
