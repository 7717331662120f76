"""Which blocks each sequence holds: allocation, prefix reuse, leases, pulls and quarantine, over one block pool."""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import groupby

from disagg.base.errors import InternalError
from disagg.base.ids import BlockHash, BlockId, Epoch, RequestId
from disagg.base.kv_events import AllBlocksCleared, AnyKvEvent, BlockStored, Medium
from disagg.base.window_blocks import WindowBlocks
from disagg.cache.block_pool import BlockPool
from disagg.cache.block_tier import BlockTier
from disagg.cache.journal import KvJournal
from disagg.cache.leases import Lease, LeaseTable
from disagg.scheduling.step.actions import BlockCopy, BlockLoad
from disagg.scheduling.step.sequence import EarlyKv, KvPart, RemoteKv, Sequence
from disagg.scheduling.step.windows import Windows


@dataclass(frozen=True, slots=True)
class KvMemory:
    """Where an instance's KV blocks are, in which tiers behind the pool, quickest first, and which slide.

    ``window`` is None where no layer has blocks of its own, as it has to be where there are tiers. ``shows_progress``
    where others can read a step's blocks while it writes them, layer by layer.
    """

    medium: Medium = Medium.GPU
    tiers: tuple[BlockTier, ...] = ()
    window: WindowBlocks | None = None
    shows_progress: bool = False


class KvLedger:
    """Books blocks in and out for sequences. It decides nothing: a refusal is a False, never a preemption."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        prefix_caching: bool,
        memory: KvMemory | None = None,
        most_in_sight: int = 0,
    ) -> None:
        """See ``capacity.most_in_sight``."""
        memory = memory or KvMemory()
        if memory.tiers and memory.window is not None:
            raise InternalError("a tier holds blocks with all layers alone")
        self.tiers = memory.tiers
        """What is kept behind the pool, the quickest first."""
        self._saving: dict[tuple[Medium, BlockHash], BlockId] = {}
        self._found_again: list[BlockHash] = []
        self.journal = KvJournal(block_size, memory.medium)
        self.pool = BlockPool(num_blocks, self.journal.removed)
        self.leases = LeaseTable()
        self.loans = LeaseTable()
        """Cached blocks that others read, under the names of their sequences."""
        self.num_prefix_queries = 0
        self.num_prefix_hits = 0
        self.num_prefix_pulled = 0
        self.num_prefix_loaded = dict.fromkeys(Medium, 0)
        self.block_size = block_size
        """Tokens of a block."""
        self._prefix_caching = prefix_caching
        self._medium = memory.medium
        self.shows_progress = memory.shows_progress and memory.window is None
        self._windows = Windows(memory.window, block_size, most_in_sight)
        self.has_windows = memory.window is not None
        """Whether layers with a sliding window have blocks of their own."""
        self._quarantine: dict[tuple[RequestId, Epoch], tuple[BlockId, ...]] = {}
        # One block in a hundred stays free at admission, so that running sequences can grow before one is preempted.
        self._headroom = max(1, num_blocks // 100)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def is_whole(self, num_tokens: int, blocks: Collection[BlockId], first: int = 0, end: int | None = None) -> bool:
        """Return whether so many blocks are what an offer of a sequence of ``num_tokens`` tokens has.

        A part of one is from its block ``first`` to before ``end``.
        """
        end = self.num_blocks_for(num_tokens) if end is None else end
        return len(blocks) == self._windows.num_offered(num_tokens, first, end)

    def part_of(self, sequence: Sequence, first: int, end: int) -> tuple[BlockId, ...]:
        """Return what is read of a sequence, from block ``first`` to before ``end``, by whoever goes on after it."""
        in_window = self._windows.held(sequence, max(first, self._windows.first_seen(sequence.num_tokens)), end)
        return sequence.block_ids[first:end] + in_window

    def admit(self, sequence: Sequence, keep_headroom: bool) -> bool:
        """Give a waiting sequence blocks for all its known tokens, reusing published prefixes.

        Taking them all at once means that a prompt, once begun, is never stopped half-way for want of blocks. Of layers
        with a window it takes as many as it will ever hold at once: later ones take the place of those it has passed.
        """
        reusable = self._reusable(sequence, sequence.num_tokens - 1)
        num_found, num_blocks = len(reusable), self.num_blocks_for(sequence.num_tokens)
        first = self._windows.first_seen(num_found * self.block_size)
        in_window = self._found_in_window(sequence.block_hashes[first:num_found])
        num_beside = (self._windows.end(first, num_blocks) - num_found) * self._windows.num_each
        taken = self._hold(reusable + in_window, 0, num_blocks - num_found + num_beside, keep_headroom)
        if taken is None:
            return False
        self._count_query(sequence, num_found)
        own, beside = _split(taken[1], num_blocks - num_found)
        sequence.block_ids, sequence.window_ids, sequence.first_in_window = reusable + own, in_window + beside, first
        sequence.num_computed = num_found * self.block_size
        sequence.num_published = num_found
        return True

    @property
    def leased(self) -> Iterator[BlockId]:
        """The blocks of every lease, loan and writer to a tier, each as often as it is held."""
        for table in (self.leases, self.loans):
            for lease in table:
                yield from lease.blocks
        yield from self._saving.values()

    @property
    def quarantined(self) -> Iterator[BlockId]:
        """The blocks of pulls that failed and may still write."""
        for blocks in self._quarantine.values():
            yield from blocks

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Make a running sequence's blocks hold ``num_tokens`` tokens; let go of those behind the window."""
        num_held = len(sequence.block_ids)
        if self._windows.num_each:
            return self._grow_with_window(sequence, num_tokens)
        if num_tokens <= num_held * self.block_size:
            return True
        taken = self.pool.allocate(self.num_blocks_for(num_tokens) - num_held)
        if taken is None:
            return False
        sequence.block_ids += taken
        return True

    def _grow_with_window(self, sequence: Sequence, num_tokens: int) -> bool:
        self.slide(sequence)
        windows, first, needed = self._windows, sequence.first_in_window, self.num_blocks_for(num_tokens)
        num_missing = max(0, needed - len(sequence.block_ids))
        held_end = first + len(sequence.window_ids) // windows.num_each
        wanted = max(needed, windows.end(first, len(sequence.block_ids)))
        for end in (wanted, needed):
            num_beside = max(0, end - held_end) * windows.num_each
            if not num_missing + num_beside:
                return True
            taken = self.pool.allocate(num_missing + num_beside)
            if taken is not None:
                sequence.block_ids += taken[:num_missing]
                sequence.window_ids += taken[num_missing:]
                return True
        return False

    def slide(self, sequence: Sequence) -> None:
        """Let go of a sequence's blocks of layers with a window which nothing that it computes from now on sees."""
        first = self._windows.first_seen(sequence.num_computed)
        if first > sequence.first_in_window:
            self.pool.release(self._windows.held(sequence, sequence.first_in_window, first))
            sequence.window_ids = sequence.window_ids[(first - sequence.first_in_window) * self._windows.num_each :]
            sequence.first_in_window = first

    def num_tokens_until_change(self, sequence: Sequence) -> int:
        """Return how many tokens can be added to a sequence before it takes or lets go of a block."""
        until_full = len(sequence.block_ids) * self.block_size - sequence.num_planned
        until_seen = self._windows.last_seen(sequence.first_in_window) - sequence.num_computed
        return max(0, min(until_full, until_seen))

    def publish(self, sequence: Sequence) -> None:
        """Make the blocks, of prompt and answer, that are completely computed findable for other sequences."""
        if not self._prefix_caching or not sequence.block_hashes:
            return
        num_full = min(sequence.num_computed // self.block_size, len(sequence.block_hashes))
        names, first = sequence.block_hashes, sequence.num_published
        if num_full <= first:
            return
        new = [self.pool.publish(sequence.block_ids[index], names[index]) for index in range(first, num_full)]
        if self._windows.num_each:
            start = max(first, sequence.first_in_window)
            in_window = self._windows.held(sequence, start, num_full)
            for block, name in zip(in_window, self._windows.names(names[start:num_full]), strict=True):
                self.pool.publish(block, name)
        for is_new, run in groupby(range(first, num_full), lambda index: new[index - first]):
            if is_new:
                indices = list(run)
                parent = names[indices[0] - 1] if indices[0] else None
                owner = (sequence.request_id, indices[0])
                self.journal.stored([names[index] for index in indices], parent, owner)
        sequence.num_published = num_full

    def all_cached(self) -> tuple[AnyKvEvent, ...]:
        """Return, in place of the events so far, all that can be found now."""
        self.journal.take()
        cached = ((self.pool.published, self._medium), *((tier.names, tier.medium) for tier in self.tiers))
        stored = [BlockStored(names, None, (), self.block_size, None, medium) for names, medium in cached if names]
        return (AllBlocksCleared(), *stored)

    def retract(self, sequence: Sequence) -> None:
        """Let no other sequence find the blocks of one that failed: what they hold may be why."""
        self.pool.retract(sequence.held)

    def free(self, sequence: Sequence) -> None:
        """Take back a running sequence's blocks."""
        self.pool.release(sequence.held)
        self._forget(sequence)

    def lease(self, sequence: Sequence, expires_s: float) -> None:
        """Keep a running sequence's blocks for another instance to read."""
        self.slide(sequence)
        self.pool.lease(sequence.held)
        self.leases.grant(Lease(sequence.request_id, sequence.epoch, sequence.held, expires_s))

    def end_lease(self, request_id: RequestId, epoch: Epoch) -> bool:
        """End one lease; False when it had ended before or is another epoch's."""
        lease = self.leases.end(request_id, epoch)
        if lease is not None:
            self.pool.end_lease(lease.blocks)
        return lease is not None

    def end_expired_leases(self, now: float) -> list[Lease]:
        """End the leases and loans whose time is over; return those of this instance's own sequences."""
        expired = self.leases.end_expired(now)
        for lease in (*expired, *self.loans.end_expired(now)):
            self.pool.end_lease(lease.blocks)
        return expired

    def next_expiry(self) -> float:
        """Return when the next lease or loan ends; infinity without any."""
        return min(table.next_expiry() or math.inf for table in (self.leases, self.loans))

    def lend(
        self, request_id: RequestId, epoch: Epoch, wanted: Collection[BlockHash], expires_s: float
    ) -> tuple[int, tuple[BlockId, ...]]:
        """Keep the cached blocks of these names, as far as there are any, for another instance to read.

        Returns how many tokens are in them, and all that are offered.
        """
        known = self.loans.find(request_id)
        if known is not None:
            self.end_loan(request_id, known.epoch)
        names = tuple(wanted)
        found = self._continuable(names, self.pool.match_prefix(names))
        num_tokens = len(found) * self.block_size
        blocks = found + self._found_in_window(names[self._windows.first_seen(num_tokens) : len(found)])
        if blocks:
            self.pool.acquire(blocks)
            self.pool.lease(blocks)
            self.loans.grant(Lease(request_id, epoch, blocks, expires_s))
        return num_tokens, blocks

    def end_loan(self, request_id: RequestId, epoch: Epoch) -> bool:
        """End one loan; False when there is none of this name and epoch."""
        loan = self.loans.end(request_id, epoch)
        if loan is not None:
            self.pool.end_lease(loan.blocks)
        return loan is not None

    def begin_pull(self, sequence: Sequence, remote: RemoteKv, keep_headroom: bool) -> bool:
        """Reserve blocks for a remote sequence; what is already here by its prefix is not copied again.

        Where a prefix is lent, the blocks of all known tokens are taken: see ``admit``.
        """
        longest = sequence.num_tokens - 1 if remote.is_prefix else remote.num_tokens
        num_coming = self.num_blocks_for(remote.num_tokens)
        num_blocks = self.num_blocks_for(sequence.num_tokens) if remote.is_prefix else num_coming
        reusable = self._reusable(sequence, longest, remote.num_tokens)
        num_found = len(reusable)
        num_computed = max(remote.num_tokens, num_found * self.block_size)
        first = self._windows.first_seen(num_computed)
        in_window = self._found_in_window(sequence.block_hashes[first:num_found])
        theirs, beside = _split(remote.blocks, num_coming)
        missing = theirs[num_found:]
        if missing:  # else what is here reaches as far, and they may not offer what is needed beside it
            missing += beside[max(0, num_found - first) * self._windows.num_each :]
        here = max(num_found, num_coming)
        num_beside = (self._windows.end(first, num_blocks) - here) * self._windows.num_each
        taken = self._hold(reusable + in_window, len(missing), num_blocks - here + num_beside, keep_headroom)
        if taken is None:
            return False
        if remote.is_prefix:
            self._count_query(sequence, num_found)
            self.num_prefix_pulled += (here - num_found) * self.block_size
        pulled, pulled_beside = _split(taken[0], here - num_found)
        own, own_beside = _split(taken[1], num_blocks - here)
        sequence.block_ids = reusable + pulled + own
        sequence.window_ids = in_window + pulled_beside + own_beside
        sequence.first_in_window = first
        sequence.num_computed = num_computed
        sequence.num_published = num_found
        sequence.copies, sequence.filling = tuple(map(BlockCopy, missing, taken[0])), taken[0]
        return True

    def begin_early(self, sequence: Sequence, early: EarlyKv) -> bool:
        """Reserve blocks for all of a sequence that another instance is still computing."""
        num_blocks = self.num_blocks_for(sequence.num_tokens)
        reusable = self._reusable(sequence, sequence.num_tokens, sequence.num_tokens)
        num_found, first = len(reusable), self._windows.first_seen(sequence.num_tokens)
        in_window = self._found_in_window(sequence.block_hashes[first:num_found])
        num_pulled = self._windows.num_offered(sequence.num_tokens, num_found, num_blocks)
        taken = self._hold(reusable + in_window, num_pulled, 0, keep_headroom=True)
        if taken is None:
            return False
        pulled, beside = _split(taken[0], num_blocks - num_found)
        sequence.block_ids, sequence.window_ids, sequence.first_in_window = reusable + pulled, in_window + beside, first
        sequence.filling = taken[0]
        early.num_here = early.num_final = sequence.num_published = num_found
        return True

    def begin_copies(self, sequence: Sequence, part: KvPart, num_here: int) -> None:
        """Let what is in a part of another pool be copied into a sequence's blocks, but for its ``num_here`` first."""
        theirs, beside = _split(part.blocks, part.end_block - part.first_block)
        in_window = self._windows.held(sequence, num_here, part.end_block)
        sources = theirs[num_here - part.first_block :] + beside[len(beside) - len(in_window) :]
        targets = sequence.block_ids[num_here : part.end_block] + in_window
        sequence.copies = tuple(map(BlockCopy, sources, targets))

    def is_quarantined(self, request_id: RequestId, epoch: Epoch) -> bool:
        """True while a failed pull of this attempt may still write."""
        return (request_id, epoch) in self._quarantine

    def num_in_tier(self, medium: Medium) -> int:
        """Return how many blocks are in the tier of this medium."""
        return sum(len(tier) for tier in self.tiers if tier.medium is medium)

    def has_room_for(self, num_blocks: int) -> bool:
        """True while so many blocks could be taken and the headroom would be left."""
        return num_blocks + self._headroom <= self.pool.num_available

    def in_tiers(self, sequence: Sequence) -> tuple[int, tuple[Medium, ...]]:
        """Return how many blocks of a waiting sequence are in the pool, and where those are that follow in a tier."""
        if not (self.tiers and self._prefix_caching and sequence.reuse_prefix):
            return 0, ()
        found, media = self._with_tiers(sequence, (sequence.num_tokens - 1) // self.block_size)
        return len(found), media

    def begin_load(self, sequence: Sequence, keep_headroom: bool) -> bool:
        """Reserve the blocks that a sequence reads from tiers, and take those for the rest of its known tokens."""
        reusable, media = self._with_tiers(sequence, sequence.end_of_read)
        first = len(reusable)
        names = sequence.block_hashes[first : first + len(media)]
        num_blocks = self.num_blocks_for(sequence.num_tokens)
        held = self._hold(reusable, len(media), num_blocks - first - len(media), keep_headroom)
        if held is None:
            return False
        taken = held[0] + held[1]
        self._count_query(sequence, len(reusable))
        for medium in media:
            self.num_prefix_loaded[medium] += self.block_size
        for tier in self.tiers:
            tier.touch(names)
        sequence.block_ids = reusable + taken
        sequence.num_computed = (first + len(media)) * self.block_size
        sequence.num_published = len(reusable)
        sequence.loads = tuple(map(BlockLoad, names, taken, media))
        sequence.filling = held[0]
        return True

    def take_found_again(self) -> list[BlockHash]:
        """Return the names of the blocks that sequences have found since the last call."""
        found, self._found_again = self._found_again, []
        return found

    def begin_save(self, name: BlockHash, medium: Medium) -> BlockId | None:
        """Keep a block as it is while it is written to a tier; None when it is not cached any more."""
        block = self.pool.find(name)
        if block is not None:
            self.pool.pin(block)
            self._saving[medium, name] = block
        return block

    def end_save(self, name: BlockHash, medium: Medium) -> None:
        """The block need not be kept for its writer any more."""
        self.pool.end_lease((self._saving.pop((medium, name)),))

    def commit_pull(self, sequence: Sequence) -> None:
        """The copies are complete: the sequence holds its blocks like any other."""
        self.pool.commit(sequence.filling)
        sequence.copies, sequence.loads, sequence.filling = (), (), ()

    def abandon_pull(self, sequence: Sequence, ended: bool) -> None:
        """Give up a pull. Until it has ``ended``, its target blocks are quarantined."""
        targets = sequence.filling
        if ended:
            self.pool.abandon(targets)
        else:
            self.pool.quarantine(targets)
            self._quarantine[sequence.request_id, sequence.epoch] = targets
        being_written = set(targets)
        self.pool.release([block for block in sequence.held if block not in being_written])
        self._forget(sequence)

    def end_quarantine(self, request_id: RequestId, epoch: Epoch) -> bool:
        """Free the quarantined blocks of a pull that has now ended; False when there are none."""
        targets = self._quarantine.pop((request_id, epoch), None)
        if targets is not None:
            self.pool.abandon(targets)
        return targets is not None

    def _with_tiers(self, sequence: Sequence, end: int) -> tuple[tuple[BlockId, ...], tuple[Medium, ...]]:
        """Return the published blocks that a sequence can begin with, and where those are that follow in a tier.

        The latter only before block ``end``.
        """
        names = sequence.block_hashes[:end]
        found = self._published(sequence, sequence.num_tokens - 1)
        return found, tuple(self._media(names, len(found)))

    def _reusable(self, sequence: Sequence, num_tokens: int, num_coming: int = 0) -> tuple[BlockId, ...]:
        """Return published blocks of the sequence's first ``num_tokens`` tokens that can be gone on from.

        Of its first ``num_coming`` tokens the other blocks come from elsewhere.
        """
        return self._continuable(sequence.block_hashes, self._published(sequence, num_tokens), num_coming)

    def _continuable(
        self, names: tuple[BlockHash, ...], found: tuple[BlockId, ...], num_coming: int = 0
    ) -> tuple[BlockId, ...]:
        """Return as many of these leading blocks as can be used where ``num_coming`` tokens will be there, or they.

        Beside those of them that the next token sees the layers with a window must be there too.
        """
        while found and self._windows.num_each:
            seen = self._windows.first_seen(max(num_coming, len(found) * self.block_size))
            lacking = [place for place in range(seen, len(found)) if not self._is_in_window(names[place])]
            if not lacking:
                break
            found = found[: lacking[-1]]
        return found

    def _is_in_window(self, name: BlockHash) -> bool:
        return all(self.pool.find(part) is not None for part in self._windows.names((name,)))

    def _found_in_window(self, names: tuple[BlockHash, ...]) -> tuple[BlockId, ...]:
        """Return what is published beside the blocks of these names, which all of it is."""
        found = tuple([block for name in self._windows.names(names) if (block := self.pool.find(name)) is not None])
        if len(found) != len(names) * self._windows.num_each:
            raise InternalError(f"{len(found)} blocks are beside {len(names)} that can be gone on from")
        return found

    def _published(self, sequence: Sequence, num_tokens: int) -> tuple[BlockId, ...]:
        """Return published blocks that hold a prefix of the sequence's first ``num_tokens`` tokens."""
        if not (self._prefix_caching and sequence.reuse_prefix):
            return ()
        return self.pool.match_prefix(sequence.block_hashes[: num_tokens // self.block_size])

    def _hold(
        self, reusable: tuple[BlockId, ...], num_pulled: int, num_own: int, keep_headroom: bool
    ) -> tuple[tuple[BlockId, ...], tuple[BlockId, ...]] | None:
        """Hold the reusable blocks; take ``num_pulled`` for a remote writer, and ``num_own``.

        None, and nothing held, when there are too few.
        """
        available = self.pool.num_available - (self.pool.num_cached_among(reusable) if reusable else 0)
        if num_pulled + num_own + (self._headroom if keep_headroom else 0) > available:
            return None
        if reusable:
            self.pool.acquire(reusable)
        pulled = self.pool.reserve(num_pulled) if num_pulled else ()
        own = self.pool.allocate(num_own) if num_own else ()
        if pulled is None or own is None:
            raise InternalError(f"{num_pulled + num_own} blocks were available and then were not")
        return pulled, own

    def _media(self, names: tuple[BlockHash, ...], start: int) -> Iterator[Medium]:
        """Yield the quickest tier of each of ``names`` from ``start`` on, up to the first that is in none."""
        for name in names[start:]:
            medium = next((tier.medium for tier in self.tiers if name in tier), None)
            if medium is None:
                return
            yield medium

    def _count_query(self, sequence: Sequence, num_found: int) -> None:
        if sequence.reuse_prefix and sequence.block_hashes and self._prefix_caching:
            self.num_prefix_queries += sequence.num_tokens
            self.num_prefix_hits += num_found * self.block_size
            if self.tiers:
                self._found_again.extend(sequence.block_hashes[:num_found])

    @staticmethod
    def _forget(sequence: Sequence) -> None:
        sequence.block_ids, sequence.window_ids, sequence.first_in_window = (), (), 0
        sequence.copies, sequence.loads, sequence.filling = (), (), ()
        sequence.num_computed = 0
        sequence.num_published = 0


def _split(blocks: tuple[BlockId, ...], count: int) -> tuple[tuple[BlockId, ...], tuple[BlockId, ...]]:
    """Return the first ``count``, and the others, which are beside them in layers with a window."""
    return blocks[:count], blocks[count:]
