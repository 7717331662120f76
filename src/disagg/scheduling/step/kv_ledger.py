"""Which blocks each sequence holds: allocation, prefix reuse, leases, pulls and quarantine, over one block pool."""

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from disagg.base.errors import InternalError
from disagg.base.ids import BlockHash, BlockId, Epoch, RequestId
from disagg.base.kv_events import AllBlocksCleared, AnyKvEvent, BlockStored, Medium
from disagg.cache.block_pool import BlockPool
from disagg.cache.block_tier import BlockTier
from disagg.cache.journal import KvJournal
from disagg.cache.layout import first_seen_block
from disagg.cache.leases import Lease, LeaseTable
from disagg.scheduling.step.actions import BlockCopy, BlockLoad
from disagg.scheduling.step.sequence import EarlyKv, RemoteKv, Sequence


@dataclass(frozen=True, slots=True)
class KvMemory:
    """Where an instance's KV blocks are, in which tiers behind the pool, quickest first, and what is needed of them.

    Layers that slide see so many tokens, ``window``; None where the model has none.
    """

    medium: Medium = Medium.GPU
    tiers: tuple[BlockTier, ...] = ()
    window: int | None = None


class KvLedger:
    """Books blocks in and out for sequences. It decides nothing: a refusal is a False, never a preemption."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        prefix_caching: bool,
        memory: KvMemory | None = None,
    ) -> None:
        memory = memory or KvMemory()
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
        self._block_size = block_size
        self._prefix_caching = prefix_caching
        self._medium = memory.medium
        self._window = memory.window
        self._quarantine: dict[tuple[RequestId, Epoch], tuple[BlockId, ...]] = {}
        # One block in a hundred stays free at admission, so that running sequences can grow before one is preempted.
        self._headroom = max(1, num_blocks // 100)

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self._block_size

    def num_blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks hold ``num_tokens`` tokens."""
        return -(-num_tokens // self._block_size)

    def fits_at_all(self, num_tokens: int) -> bool:
        """True when an otherwise empty pool could hold the tokens."""
        return self.num_blocks_for(num_tokens) <= self.pool.num_blocks

    def first_seen_block(self, num_tokens: int) -> int:
        """Return the first of a sequence's blocks of which the token after ``num_tokens`` needs the sliding layers."""
        return first_seen_block(num_tokens, self._window, self._block_size)

    def num_outside(self, num_tokens: int, first: int, end: int) -> int:
        """Return how many of the blocks from ``first`` to before ``end`` are outside the window then."""
        return max(0, min(self.first_seen_block(num_tokens), end) - first)

    def admit(self, sequence: Sequence, keep_headroom: bool) -> bool:
        """Give a waiting sequence blocks for all its known tokens, reusing published prefixes.

        Taking them all at once means that a prompt, once begun, is never stopped half-way for want of blocks.
        """
        reusable = self._reusable(sequence, sequence.num_tokens - 1)
        taken = self._hold(reusable, self.num_blocks_for(sequence.num_tokens), keep_headroom)
        if taken is None:
            return False
        self._count_query(sequence, len(reusable))
        sequence.block_ids = reusable + taken
        sequence.num_computed = len(reusable) * self._block_size
        sequence.num_published = len(reusable)
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
        """Make a running sequence's blocks hold ``num_tokens`` tokens."""
        num_held = len(sequence.block_ids)
        if num_tokens <= num_held * self._block_size:
            return True
        taken = self.pool.allocate(self.num_blocks_for(num_tokens) - num_held)
        if taken is None:
            return False
        sequence.block_ids += taken
        return True

    def publish(self, sequence: Sequence) -> None:
        """Make the blocks, of prompt and answer, that are completely computed findable for other sequences."""
        if not self._prefix_caching or not sequence.block_hashes:
            return
        num_full = min(sequence.num_computed // self._block_size, len(sequence.block_hashes))
        names, first = sequence.block_hashes, sequence.num_published
        if num_full <= first:
            return
        new = [self.pool.publish(sequence.block_ids[index], names[index]) for index in range(first, num_full)]
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
        stored = [BlockStored(names, None, (), self._block_size, None, medium) for names, medium in cached if names]
        return (AllBlocksCleared(), *stored)

    def retract(self, sequence: Sequence) -> None:
        """Let no other sequence find the blocks of one that failed: what they hold may be why."""
        self.pool.retract(sequence.block_ids)

    def free(self, sequence: Sequence) -> None:
        """Take back a running sequence's blocks."""
        self.pool.release(sequence.block_ids)
        self._forget(sequence)

    def lease(self, sequence: Sequence, expires_s: float) -> None:
        """Keep a running sequence's blocks for another instance to read."""
        self.pool.lease(sequence.block_ids)
        self.leases.grant(Lease(sequence.request_id, sequence.epoch, sequence.block_ids, expires_s))

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
        self, request_id: RequestId, epoch: Epoch, names: Collection[BlockHash], expires_s: float
    ) -> tuple[BlockId, ...]:
        """Keep the cached blocks of these names, as far as there are any, for another instance to read."""
        known = self.loans.find(request_id)
        if known is not None:
            self.end_loan(request_id, known.epoch)
        blocks = self._continuable(self.pool.match_prefix(tuple(names)))
        if blocks:
            self.pool.acquire(blocks)
            self.pool.lease(blocks)
            self.loans.grant(Lease(request_id, epoch, blocks, expires_s))
        return blocks

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
        num_blocks = self.num_blocks_for(sequence.num_tokens) if remote.is_prefix else len(remote.blocks)
        reusable = self._reusable(sequence, longest, remote.num_tokens)
        missing = remote.blocks[len(reusable) :]
        taken = self._hold(reusable, num_blocks, keep_headroom, num_pulled=len(missing))
        if taken is None:
            return False
        if remote.is_prefix:
            self._count_query(sequence, len(reusable))
            self.num_prefix_pulled += len(missing) * self._block_size
        sequence.block_ids = reusable + taken
        sequence.num_computed = max(remote.num_tokens, len(reusable) * self._block_size)
        sequence.num_published = len(reusable)
        targets = taken[: len(missing)]
        self.pool.lose_window(targets[: self.num_outside(remote.num_tokens, len(reusable), len(remote.blocks))])
        if len(missing) != len(targets):
            raise InternalError(f"{len(targets)} blocks were taken for a copy of {len(missing)}")
        sequence.copies, sequence.filling = tuple(map(BlockCopy, missing, targets)), targets
        return True

    def begin_early(self, sequence: Sequence, early: EarlyKv) -> bool:
        """Reserve blocks for all of a sequence that another instance is still computing."""
        num_blocks = self.num_blocks_for(sequence.num_tokens)
        reusable = self._reusable(sequence, sequence.num_tokens, sequence.num_tokens)
        taken = self._hold(reusable, num_blocks, keep_headroom=True, num_pulled=num_blocks - len(reusable))
        if taken is None:
            return False
        self.pool.lose_window(taken[: self.num_outside(sequence.num_tokens, len(reusable), num_blocks)])
        sequence.block_ids, sequence.filling = reusable + taken, taken
        early.num_here = sequence.num_published = len(reusable)
        return True

    @staticmethod
    def begin_copies(sequence: Sequence, first: int, sources: Iterable[BlockId]) -> None:
        """Let these blocks of another pool be copied into those of a sequence from its ``first`` on."""
        sequence.copies = tuple(map(BlockCopy, sources, sequence.block_ids[first:]))

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
        found, media = self._with_tiers(sequence, (sequence.num_tokens - 1) // self._block_size)
        return len(found), media

    def begin_load(self, sequence: Sequence, keep_headroom: bool) -> bool:
        """Reserve the blocks that a sequence reads from tiers, and take those for the rest of its known tokens."""
        reusable, media = self._with_tiers(sequence, sequence.end_of_read)
        first = len(reusable)
        names = sequence.block_hashes[first : first + len(media)]
        num_blocks = self.num_blocks_for(sequence.num_tokens)
        taken = self._hold(reusable, num_blocks, keep_headroom, num_pulled=len(media))
        if taken is None:
            return False
        self._count_query(sequence, len(reusable))
        for medium in media:
            self.num_prefix_loaded[medium] += self._block_size
        for tier in self.tiers:
            tier.touch(names)
        sequence.block_ids = reusable + taken
        sequence.num_computed = (first + len(media)) * self._block_size
        sequence.num_published = len(reusable)
        sequence.loads = tuple(map(BlockLoad, names, taken, media))
        sequence.filling = taken[: len(media)]
        return True

    def take_found_again(self) -> list[BlockHash]:
        """Return the names of the blocks that sequences have found since the last call."""
        found, self._found_again = self._found_again, []
        return found

    def begin_save(self, name: BlockHash, medium: Medium) -> BlockId | None:
        """Keep a block as it is while it is written to a tier; None when it is not cached any more."""
        block = self.pool.find(name)
        if block is not None and not self.pool.has_window(block):
            return None  # a file holds all layers
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
        self.pool.release([block for block in sequence.block_ids if block not in being_written])
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
        while True:
            media = tuple(self._media(names, len(found)))
            usable = self._continuable(found, (len(found) + len(media)) * self._block_size)
            if len(usable) == len(found):
                return found, media
            found = usable

    def _reusable(self, sequence: Sequence, num_tokens: int, num_coming: int = 0) -> tuple[BlockId, ...]:
        """Return published blocks of the sequence's first ``num_tokens`` tokens that can be gone on from.

        Of its first ``num_coming`` tokens the other blocks come from elsewhere.
        """
        return self._continuable(self._published(sequence, num_tokens), num_coming)

    def _continuable(self, found: tuple[BlockId, ...], num_coming: int = 0) -> tuple[BlockId, ...]:
        """Return as many of these leading blocks as can be used where ``num_coming`` tokens will be there, or they.

        What the next token sees of them must be there in the sliding layers too.
        """
        if self._window is None:
            return found
        while found:
            seen = self.first_seen_block(max(num_coming, len(found) * self._block_size))
            lacking = [place for place in range(seen, len(found)) if not self.pool.has_window(found[place])]
            if not lacking:
                break
            found = found[: lacking[-1]]
        return found

    def _published(self, sequence: Sequence, num_tokens: int) -> tuple[BlockId, ...]:
        """Return published blocks that hold a prefix of the sequence's first ``num_tokens`` tokens."""
        if not (self._prefix_caching and sequence.reuse_prefix):
            return ()
        return self.pool.match_prefix(sequence.block_hashes[: num_tokens // self._block_size])

    def _hold(
        self, reusable: tuple[BlockId, ...], num_blocks: int, keep_headroom: bool, num_pulled: int = 0
    ) -> tuple[BlockId, ...] | None:
        """Hold the reusable blocks and take the rest of ``num_blocks``; None, and nothing held, when they lack.

        The first ``num_pulled`` of those taken are for a remote writer.
        """
        missing = num_blocks - len(reusable)
        available = self.pool.num_available - (self.pool.num_cached_among(reusable) if reusable else 0)
        if missing + (self._headroom if keep_headroom else 0) > available:
            return None
        if reusable:
            self.pool.acquire(reusable)
        pulled = self.pool.reserve(num_pulled) if num_pulled else ()
        own = self.pool.allocate(missing - num_pulled) if missing > num_pulled else ()
        if pulled is None or own is None:
            raise InternalError(f"{missing} blocks were available and then were not")
        return pulled + own

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
            self.num_prefix_hits += num_found * self._block_size
            if self.tiers:
                self._found_again.extend(sequence.block_hashes[:num_found])

    @staticmethod
    def _forget(sequence: Sequence) -> None:
        sequence.block_ids = ()
        sequence.copies, sequence.loads, sequence.filling = (), (), ()
        sequence.num_computed = 0
        sequence.num_published = 0
