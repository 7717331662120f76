"""Pulls that begin while another instance is still computing the sequence: its blocks are read part by part.

All of the sequence's blocks are reserved at once, when nobody else wants them, and are let go again as soon as somebody
does who can use them now: a running sequence that grows, or one whose blocks are all there. Whatever goes wrong with a
part, nothing is lost: the whole offer comes at the end of the prompt, and then all of it is pulled.

The last part is read behind the step that writes it, and waits for it most of the time: so it holds up nothing else.
What came is only known to be right when the whole offer says so; if it does not, that part is read again.
"""

import bisect
from collections import deque
from collections.abc import Callable

from disagg.base.ids import Epoch, InstanceId, RequestId
from disagg.scheduling.step.actions import Pull, StopPull
from disagg.scheduling.step.books import Books, order_of
from disagg.scheduling.step.events import KvExtended, KvOffered
from disagg.scheduling.step.sequence import EarlyKv, KvPart, RemoteKv, Sequence, SequenceState

Done = Callable[[RequestId, Epoch], None]


class EarlyPulls:
    """The sequences of one instance that are computed elsewhere and read already.

    ``offered`` are those whose blocks are all there. ``compute_here`` takes a sequence that cannot be pulled, ``done``
    one of which nothing is left to pull.
    """

    def __init__(
        self, books: Books, offered: list[Sequence], compute_here: Callable[[Sequence], None], done: Done
    ) -> None:
        self._books = books
        self._offered = offered
        self._compute_here = compute_here
        self._done = done
        self.without_room: list[Sequence] = []
        """Those that no block is reserved for, in order."""
        self.awaiting: list[Sequence] = []
        """Those that have their blocks, and of which no part is being read."""
        self._behind: list[Sequence] = []
        """Those of which a part is being read behind the step that writes it."""

    @property
    def num_patient(self) -> int:
        """How many sequences wait for another instance's step, with their blocks reserved."""
        return len(self.awaiting) + len(self._behind)

    def is_behind(self, sequence: Sequence) -> bool:
        """Return whether a part of the sequence is being read behind the step that writes it."""
        return sequence in self._behind

    def enter(self, event: KvOffered) -> None:
        """Take a sequence of which a first part is offered."""
        sequence = self._books.enter(event, SequenceState.OFFERED)
        sequence.num_prefill_tokens = event.num_tokens
        end = self._books.ledger.num_blocks_for(event.num_kv_tokens)
        sequence.early = EarlyKv(event.source, deque([_part_of(event, 0, end)]))
        bisect.insort(self.without_room, sequence, key=order_of)

    def on_extended(self, event: KvExtended) -> None:
        """Take the next part of one."""
        sequence = self._find(event.request_id, event.epoch)
        if sequence is not None and sequence.early is not None and sequence.remote is None:
            end = self._books.ledger.num_blocks_for(event.num_kv_tokens)
            sequence.early.parts.append(_part_of(event, event.first_block, end))

    def completes(self, event: KvOffered) -> bool:
        """Take the whole offer of a sequence that is known from its parts; return False for any other."""
        sequence = self._find(event.request_id, event.epoch)
        if sequence is None or sequence.early is None:
            return False
        if not event.is_whole or sequence.remote is not None:
            return True  # a repetition
        num_known, sequence.num_tokens = sequence.num_tokens, event.num_tokens
        sequence.block_hashes = event.block_hashes
        sequence.go_on(event.answer_age_s, event.num_later_tokens, self._books.now)
        sequence.remote = RemoteKv(event.source, event.source_blocks, event.num_kv_tokens, event.expires_s)
        sequence.early.parts.clear()
        if not event.is_sound:
            sequence.early.num_here = sequence.early.num_final
        is_whole = self._books.ledger.is_whole(event.num_kv_tokens, event.source_blocks)
        sequence.early.fits = is_whole and num_known == event.num_kv_tokens
        self._books.wake_at(event.expires_s)
        if sequence.state is SequenceState.OFFERED:
            fits, sequence.early = sequence.early.fits, None
            self.without_room.remove(sequence)
            bisect.insort(self._offered, sequence, key=order_of)
            if not fits:
                self._compute_here(sequence)
        return True

    def start(self) -> None:
        """Read the rest of what is offered whole; beside that a part, where nothing else is being read.

        An instance copies one hand-over after the other, and starts the next one between two steps: parts that queued
        for that would keep back those whose turn it is.
        """
        if not (self.awaiting or self.without_room):
            return
        for sequence in list(self.awaiting):
            if sequence.remote is not None:
                self._read_next(sequence)
        for sequence in list(self.awaiting):
            if self._is_reading:
                return
            self._read_next(sequence)
        for sequence in list(self.without_room):
            if self._is_reading or not self._reserve(sequence):
                return

    @property
    def _is_reading(self) -> bool:
        return self._books.num_pulling > self.num_patient

    def _reserve(self, sequence: Sequence) -> bool:
        """Reserve room for a sequence while nobody who could use it now is without; return False where somebody is."""
        books, early = self._books, sequence.early
        assert early is not None, "it is known from its parts"
        if not books.has_room or self._offered or books.waiting:
            return False
        if early.is_given_up or books.ledger.is_quarantined(sequence.request_id, sequence.epoch):
            return True
        if not books.ledger.begin_early(sequence, early):
            return False
        self.without_room.remove(sequence)
        books.num_pulling += 1
        self.wait(sequence)
        self._read_next(sequence)
        return True

    def arrived(self, sequence: Sequence) -> bool:
        """What was being read is here; return whether that is all, and the sequence can run."""
        early, remote = sequence.early, sequence.remote
        assert early is not None, "it is known from its parts"
        early.num_here, sequence.copies = early.num_coming, ()
        if not self._stop_following(sequence):
            early.num_final = early.num_here
        early.reading = None
        if remote is None or early.num_here < len(sequence.block_ids):
            self.wait(sequence)
            return False
        sequence.early, sequence.num_computed = None, remote.num_tokens
        return True

    def missed(self, sequence: Sequence) -> None:
        """What was being read behind a step did not come: it is in the whole offer, like the rest."""
        early = sequence.early
        assert early is not None, "it is known from its parts"
        self._stop_following(sequence)
        early.reading, sequence.copies = None, ()
        self.wait(sequence)

    def wait(self, sequence: Sequence) -> None:
        """Let a sequence that has its blocks wait for what comes next of it."""
        sequence.move(SequenceState.AWAITING, self._books.now)
        bisect.insort(self.awaiting, sequence, key=order_of)

    def make_room(self) -> bool:
        """Let go of the blocks of the last sequence that is only waited for; return False when there is none.

        Those that are read behind a step are free a little later.
        """
        for sequence in reversed(self.awaiting):
            if sequence.remote is None:
                self.give_up(sequence)
                return True
        for sequence in reversed(self._behind):
            if sequence.remote is None:
                self.give_up(sequence, ended=False)
                self._books.actions.append(StopPull(request_id=sequence.request_id, epoch=sequence.epoch))
                return False
        return False

    def give_up(self, sequence: Sequence, *, ended: bool = True) -> None:
        """Let go of what is reserved for a sequence, and wait for its whole offer."""
        early = sequence.early
        assert early is not None, "it is known from its parts"
        self.let_go(sequence, ended=ended)
        early.is_given_up, early.num_here, early.num_final, early.reading = True, 0, 0, None
        early.parts.clear()
        sequence.move(SequenceState.OFFERED, self._books.now)
        bisect.insort(self.without_room, sequence, key=order_of)

    def let_go(self, sequence: Sequence, *, ended: bool) -> None:
        """Take back what is reserved for a sequence; its record stays open."""
        if sequence.state is SequenceState.AWAITING:
            self.awaiting.remove(sequence)
        self._stop_following(sequence)
        self._books.num_pulling -= 1
        self._books.ledger.abandon_pull(sequence, ended)

    def on_source_lost(self, source: InstanceId) -> None:
        """An instance died: nothing more comes of what it computed. Whoever sent that here says what becomes of it."""
        for sequence in [*self.without_room, *self.awaiting]:
            if sequence.early is not None and sequence.early.source == source and sequence.remote is None:
                sequence.early.is_given_up = True
                if sequence.state is SequenceState.AWAITING:
                    self.give_up(sequence)

    def _read_next(self, sequence: Sequence) -> None:
        """Start to read the next part, or the rest once the whole is offered."""
        early, remote = sequence.early, sequence.remote
        assert early is not None, "it is known from its parts"
        if remote is not None and not early.fits:
            self.let_go(sequence, ended=True)
            sequence.early = None
            self._compute_here(sequence)
            return
        if remote is not None:
            whole = KvPart(0, len(sequence.block_ids), remote.blocks, remote.expires_s)
            self._read(sequence, early, whole, is_whole=True)
            return
        while early.parts and early.parts[0].end_block <= early.num_here:
            early.parts.popleft()
        if not early.parts or early.parts[0].first_block > early.num_here:
            return
        part = early.reading = early.parts.popleft()
        if self._books.now >= part.expires_s or not self._is_of(sequence, part):
            self.give_up(sequence)
        else:
            self._read(sequence, early, part, is_whole=False)

    def _is_of(self, sequence: Sequence, part: KvPart) -> bool:
        first, end = part.first_block, part.end_block
        is_whole = self._books.ledger.is_whole(sequence.num_tokens, part.blocks, first, end)
        return end <= len(sequence.block_ids) and is_whole

    def _read(self, sequence: Sequence, early: EarlyKv, part: KvPart, *, is_whole: bool) -> None:
        books = self._books
        self.awaiting.remove(sequence)
        sequence.move(SequenceState.PULLING, books.now)
        early.num_coming = part.end_block
        if part.behind_step:
            self._behind.append(sequence)
        books.ledger.begin_copies(sequence, part, early.num_here)
        if not sequence.copies:
            self._done(sequence.request_id, sequence.epoch)
            return
        books.actions.append(
            Pull(
                request_id=sequence.request_id,
                epoch=sequence.epoch,
                source=early.source,
                copies=sequence.copies,
                expires_s=part.expires_s,
                part=None if is_whole else part.first_block,
            )
        )

    def _stop_following(self, sequence: Sequence) -> bool:
        """Note that nothing of the sequence is read behind a step any more; return whether something was."""
        was_behind = sequence in self._behind
        if was_behind:
            self._behind.remove(sequence)
        return was_behind

    def _find(self, request_id: RequestId, epoch: Epoch) -> Sequence | None:
        sequence = self._books.sequences.get(request_id)
        return sequence if sequence is not None and sequence.epoch == epoch else None


def _part_of(event: KvOffered | KvExtended, first_block: int, end_block: int) -> KvPart:
    return KvPart(first_block, end_block, event.source_blocks, event.expires_s, event.behind_step)
